"""A regression gate: runs are checked against a baseline, and each gate passes, fails or says that it could not decide."""
