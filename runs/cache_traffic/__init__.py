"""Bytes of K and V that travel between tiers, by variant."""
