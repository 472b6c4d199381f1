"""One module for each contender, and `measure.py`, which runs them; each runs by its path."""
