"""The command `flexgen-helm plan`."""
