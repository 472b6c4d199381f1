"""Suites: one folder each with run entries, schema and command."""
