"""Optimizers and schedules, all of them Optax's."""

import jax
import optax

from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.models.axes import axes
from omnifusion_jax.training.parts import factor


def schedule(c: OptimizerConfig, steps):
    """Step to learning rate: linear warm-up over a share of all steps, then a cosine to zero or a constant."""
    warmup = round(c.warmup * steps)
    main = {
        "cosine": lambda: optax.cosine_decay_schedule(c.learning_rate, max(1, steps - warmup)),
        "constant": lambda: optax.constant_schedule(c.learning_rate),
    }[c.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, c.learning_rate, warmup), main], [warmup]) if warmup else main


def matrices(path, a):
    """A parameter as [layers, in, out] (vectors: [layers, size]): one matrix a layer, as PyTorch keeps it. `layers` is 1 outside a stack."""
    names = axes(path)
    layers = a.shape[0] if names[0] == "layers" else 1
    inner = a.shape[1:] if names[0] == "layers" else a.shape
    if len(inner) == 1 or path.endswith("_bias"):
        return a.reshape(layers, -1)
    into = a.shape[-1] if path.endswith("/out") else None  # heads are on the input side of an output projection, else on the output side
    return a.reshape(layers, -1, into) if into else a.reshape(layers, inner[0], -1)


def per_matrix(rule):
    """Applies an Optax rule to each layer's matrix alone: for rules whose result depends on the whole array, as Adafactor's factors and sizes."""

    def init(params):
        return {path: jax.vmap(rule.init)(matrices(path, a)) for path, a in params.items()}

    def update(updates, state, params):
        done = {path: jax.vmap(rule.update)(matrices(path, u), state[path], matrices(path, params[path])) for path, u in updates.items()}
        return {path: u.reshape(updates[path].shape) for path, (u, _) in done.items()}, {path: s for path, (_, s) in done.items()}

    return optax.GradientTransformation(init, update)


def adafactor(rate, c):
    """As transformers' `Adafactor(relative_step=False)`: scaled by parameter size, update clipped at 1, every matrix factored, no momentum."""
    return per_matrix(optax.adafactor(rate, min_dim_size_to_factor=1))


RULES = {
    "adamw": lambda rate, c: optax.adamw(rate, b2=c.beta2, weight_decay=c.weight_decay),
    "adafactor": adafactor,
}


def make_optimizer(c: OptimizerConfig, steps, train_parts):
    """Clip by global norm, the rule, then the part's own factor."""

    def scale(updates, state, params=None):
        return {path: u * factor(train_parts, path) for path, u in updates.items()}, state

    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    return optax.chain(clip, RULES[c.name](schedule(c, steps), c), optax.GradientTransformation(lambda params: optax.EmptyState(), scale))
