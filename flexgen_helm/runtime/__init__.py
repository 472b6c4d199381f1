"""The engine: model loading, record and replay, executor, sampling, results."""
