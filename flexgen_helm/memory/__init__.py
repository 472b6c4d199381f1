"""Tensors on device, host and disk: weights, hidden states, the links that copy them, and the meter that measures a run."""
