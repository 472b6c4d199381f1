"""How many sequences fit into a cache at a time, by length and variant."""
