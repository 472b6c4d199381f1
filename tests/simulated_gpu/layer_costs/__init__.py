"""What rows of large models cost in a layer, counted on the simulated GPU, and the time that follows on a real one."""
