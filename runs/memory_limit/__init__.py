"""Processes with less memory than their model needs: what the measurements under a memory limit share."""
