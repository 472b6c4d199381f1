"""Faults in numbers, in one command: ``python -m flexgen_helm.runs.fault_matrix``."""
