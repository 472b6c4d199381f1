"""What is computed when: prefix tree, rows, admission, operations. No torch."""
