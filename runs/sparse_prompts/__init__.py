"""What sparse attention costs in prompts, against dense attention."""
