"""Prediction of a pipeline: stages that compute a part of the layers each, and a network between them."""
