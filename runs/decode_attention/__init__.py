"""What the attention of a decode step costs on this CPU."""
