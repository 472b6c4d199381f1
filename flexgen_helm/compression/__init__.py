"""Quantizers of weights: pure functions from tensors to their stored form and back."""
