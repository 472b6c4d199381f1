"""The engine against FlexLLMGen, Accelerate and DeepSpeed ZeRO-Inference: same model, limit and prompts; see `README.md`."""
