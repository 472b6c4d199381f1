"""A pipeline over a slow network, against what the plan predicts and against one batch at a time."""
