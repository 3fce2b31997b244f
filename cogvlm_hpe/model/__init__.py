"""CogVLM for transformers 5, under the parameter names of the published checkpoints."""
