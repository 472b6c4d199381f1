"""The engine as a model of other evaluation harnesses: Inspect and lm-eval.

Each is installed by an extra of its own, and only the files that carry its name import it.
"""
