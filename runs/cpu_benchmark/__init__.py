"""Engine against plain transformers on the CPU, on real weights and HELM's own prompts."""
