"""Attention over the pages of many sequences at once, in fixed splits."""
