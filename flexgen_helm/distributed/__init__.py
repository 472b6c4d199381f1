"""A pipeline of stages over torch.distributed: each process computes a range of layers on a device with tiers of its own."""
