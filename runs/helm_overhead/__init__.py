"""What HELM, adaptation, scheduling and writing cost: a whole suite on a model that costs next to nothing."""
