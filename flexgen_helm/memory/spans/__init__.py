"""Spans: what each resource did, and what the device waited for between its own."""
