"""Compressed variants of a model: their names and what these mean."""
