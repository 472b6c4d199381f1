"""Two models side by side over the same tokens: what a candidate changes in what a reference predicts."""
