"""Suites over workers: several processes, GPUs or hosts answer the requests of one command. Ray starts and restarts them."""
