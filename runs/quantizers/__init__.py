"""What quantizers of weights lose, and how fast they are."""
