"""Real model weights and real data that install from the package registry, fetched and converted once."""
