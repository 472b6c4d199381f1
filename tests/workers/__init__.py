"""Suites over workers."""
