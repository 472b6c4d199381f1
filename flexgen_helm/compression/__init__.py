"""Compressed variants of a model: their names, the quantizers, and the stored form of compressed weights."""
