"""Statistics of means, of pairs and of gates, on NumPy and SciPy; they know nothing of models and need no torch."""
