"""A transformers model cut into its layers: recorder, layers, experts, embeddings, context length."""
