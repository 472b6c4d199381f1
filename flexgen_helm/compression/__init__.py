"""Compression: what is stored in fewer bits, and how it is brought back."""
