"""Faults of whole commands: kills, full disks, two at once, the clock set back."""
