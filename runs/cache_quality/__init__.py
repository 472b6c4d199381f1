"""What compressed K/V and sparse attention lose, by length of the text."""
