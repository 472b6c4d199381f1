"""Simulated scaling to several GPUs beside the figures of the FlexGen paper."""
