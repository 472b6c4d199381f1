"""What each part of the runtime is worth under a memory limit: ``python -m flexgen_helm.runs.offload_ablation``."""
