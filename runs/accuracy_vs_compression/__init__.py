"""What compressed variants of a model cost in accuracy, and what they save."""
