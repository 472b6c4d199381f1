"""From a model folder to a filled model: config, refusals, checkpoint, conversion, weights, digest."""
