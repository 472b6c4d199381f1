"""Damaged files: how they are damaged, and what must become of whatever reads them."""
