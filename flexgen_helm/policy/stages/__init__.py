"""Stages of a pipeline in a plan: which layers they get, and the rows that travel between them. No torch."""
