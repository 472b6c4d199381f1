"""K and V of sequences: pages, where they are stored, and how they come to the device."""
