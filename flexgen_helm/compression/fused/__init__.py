"""Unpacking of quantised weights on a GPU in one pass: codes are read once, weights written once."""
