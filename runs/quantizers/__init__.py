"""Quantizers of weights on a real model: what they cost in quality, bytes and time."""
