"""A real model on real questions, in a few minutes on a CPU."""
