"""A model computed in rows of one kind: packed or single, and the checks that choose."""
