"""Compression: variants by name, quantizers, and the stored form of compressed weights."""
