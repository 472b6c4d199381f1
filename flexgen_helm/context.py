"""How configs name a model's context window. Imports neither torch nor transformers."""

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
)
"""The common name first; the last is that of Whisper's decoder."""
DEFAULT_CONTEXT = 2048
"""In tokens, for configs that name none, such as those of models without positions."""
