"""What a compressed K/V cache is worth on a slow tier: ``python -m flexgen_helm.runs.cache_tiers``."""
