"""Interpreters of the schedule's operations: serial and overlapped."""
