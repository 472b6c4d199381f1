"""MMLU, all subjects."""
