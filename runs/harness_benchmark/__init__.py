"""The engine in other harnesses, against their own Hugging Face backends; see `README.md`."""
