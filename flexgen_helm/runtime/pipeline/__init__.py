"""An engine whose layers are divided into stages: what the first stage orders, and what the others do."""
