"""Learning rate as a pure function of the step, so that it needs no state and resumes by itself."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, min_ratio: float) -> float:
    """Rate of the 0-based `step`: linear warm-up to `peak`, then a cosine down to `peak · min_ratio` at the end."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
