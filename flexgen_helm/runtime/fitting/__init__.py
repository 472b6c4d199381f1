"""Fitting: weights are quantised layer by layer, after one forward over random tokens where the scheme asks for it."""
