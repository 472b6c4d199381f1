"""Compiled layers: what lies between products, experts and attention becomes a few kernels."""
