"""Reading of what runs have left."""
