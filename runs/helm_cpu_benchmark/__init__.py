"""HELM's own Hugging Face client against the engine, both through ``helm-run``, with plain transformers as judge."""
