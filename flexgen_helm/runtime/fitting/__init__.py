"""Fitting: weights are quantised layer by layer, after one pass over random tokens where the scheme asks for it."""
