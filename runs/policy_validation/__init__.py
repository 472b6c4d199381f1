"""Predictions of the planner beside what is measured, policy by policy."""
