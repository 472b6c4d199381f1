"""The cost of HELM, adaptation, scheduling and writing: a whole suite on a model that costs next to nothing."""
