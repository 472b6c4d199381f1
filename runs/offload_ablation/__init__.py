"""The worth of each part of the runtime under a memory limit: ``python -m flexgen_helm.runs.offload_ablation``."""
