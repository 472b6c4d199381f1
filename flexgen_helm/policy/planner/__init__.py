"""Planner: predicts what a policy takes on a machine, and searches the best one (FlexGen section 4.3). No torch."""
