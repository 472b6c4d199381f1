"""Hostile requests: what is sent, what the documentation says of it, and what plain transformers answers."""
