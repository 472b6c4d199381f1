"""Load a model folder: config, refusals of unsupported models, checkpoint, conversion of weights, digest."""
