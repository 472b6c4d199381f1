"""The schedule: prefix tree, rows, admission, operations and what they depend on. No torch."""
