"""Reads what HELM has written for runs, as the base of every report."""
