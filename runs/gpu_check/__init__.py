"""The first ten minutes on a GPU: ``python -m flexgen_helm.runs.gpu_check``."""
