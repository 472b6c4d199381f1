"""A suite killed again and again at random moments: ``python -m flexgen_helm.runs.kill_test``."""
