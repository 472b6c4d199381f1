"""The time of a sweep against the bytes that it reads, for each way to store weights."""
