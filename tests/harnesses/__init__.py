"""Other harnesses on the engine. They run in environments of their own: ``make test-harnesses``."""
