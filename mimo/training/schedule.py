"""The learning rate of a step."""

import math

from mimo.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, ...: from lr / warmup to lr over `warmup` steps, then half a cosine to lr_end, or lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - 1 - config.warmup))
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
