"""Optimizers and schedules, all of them Optax's."""

import optax

from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.training.parts import factor


def schedule(c: OptimizerConfig, steps):
    """Step to learning rate: linear warm-up over a share of all steps, then a cosine to zero or a constant."""
    warmup = round(c.warmup * steps)
    main = {
        "cosine": lambda: optax.cosine_decay_schedule(c.learning_rate, max(1, steps - warmup)),
        "constant": lambda: optax.constant_schedule(c.learning_rate),
    }[c.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, c.learning_rate, warmup), main], [warmup]) if warmup else main


# Adafactor as transformers' `Adafactor(relative_step=False)`: scaled by parameter size, update clipped at 1, no momentum
RULES = {
    "adamw": lambda rate, c: optax.adamw(rate, b2=c.beta2, weight_decay=c.weight_decay),
    "adafactor": lambda rate, c: optax.adafactor(rate, weight_decay_rate=c.weight_decay or None),
}


def make_optimizer(c: OptimizerConfig, steps, train_parts):
    """Clip by global norm, the rule, then the part's own factor."""

    def scale(updates, state, params=None):
        return {path: u * factor(train_parts, path) for path, u in updates.items()}, state

    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    return optax.chain(clip, RULES[c.name](schedule(c, steps), c), optax.GradientTransformation(lambda params: optax.EmptyState(), scale))
