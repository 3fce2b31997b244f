"""LoRA or full-parameter training under DeepSpeed."""
