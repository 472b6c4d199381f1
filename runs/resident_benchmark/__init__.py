"""The engine against other ways to run a model that fits into memory; see `README.md`."""
