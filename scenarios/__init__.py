"""HELM scenarios, run specs and metrics of ours. ``run_specs`` registers them; data is read only when a run begins."""
