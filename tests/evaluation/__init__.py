"""`flexgen-helm eval`."""
