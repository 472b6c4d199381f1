"""A model twice as large as the memory, from disk, against Accelerate: ``python -m flexgen_helm.runs.larger_than_ram``."""
