"""One module for each harness, and `measure.py`, which runs them in an interpreter that has the harness."""
