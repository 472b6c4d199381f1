"""The engine: puts itself together, takes jobs in, runs sweeps and gives results out."""
