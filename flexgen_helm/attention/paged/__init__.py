"""Attention of rows on a GPU: one Triton kernel that reads pages in place."""
