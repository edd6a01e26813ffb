"""Optimizers and learning-rate schedules, built from Optax."""

import re

import jax
import jax.numpy as jnp
import optax

from omnifusion_jax.config import OptimizerConfig, check
from omnifusion_jax.models.axes import axes
from omnifusion_jax.training.freeze import factor

# Whether weight decay pulls a parameter towards zero. It is meant for what multiplies features: kernels and
# embedding tables, as in transformers' trainer. Norms and biases are left alone. So are vectors that are
# added to features or stand among them (positions, tokens, queries), which carry information of their own,
# as in timm; and factors that would switch a part off at zero (layer scale, weights of the mix).
DECAY = [
    (r".*/kernel|decoder/(embed|head)|head", True),  # head: of a bare encoder
    (r"\w+/encoders/\d+/(class_token|registers|position|layers/scale\d)", False),
    (r"\w+/adapter/(queries|mixes/\d+/layers/weight)", False),
    (r"special/\w+", False),
    (r".*/bias", False),
    (r".*norm\d?/scale", False),
]


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter at `path`.

    Raises: ConfigError unless exactly one row of DECAY matches.
    """
    hits = [answer for pattern, answer in DECAY if re.fullmatch(pattern, path)]
    check(
        len(hits) == 1,
        f"{path}: {len(hits)} rows of training.optimizer.DECAY match, exactly one must. "
        "Append one, or correct it",
    )
    return hits[0]


def decayed(params):
    """The mask {path: whether it decays} that Optax takes."""
    return {path: decays(path) for path in params}


def schedule(c: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then a cosine to zero or a constant.

    The horizon is `c.horizon * steps`; the warm-up is a share of it. The published code counts the batches of
    every device, so that on 8 devices its runs end at an eighth of their horizon.
    """
    horizon = round(c.horizon * steps)
    warmup = round(c.warmup * horizon)
    main = {
        "cosine": lambda: optax.cosine_decay_schedule(c.learning_rate, max(1, horizon - warmup)),
        "constant": lambda: optax.constant_schedule(c.learning_rate),
    }[c.schedule]()
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, c.learning_rate, warmup), main], [warmup])


def matrices(path: str, a: jax.Array) -> jax.Array:
    """A parameter as one matrix per layer, as PyTorch keeps it.

    The result is [layers, in, out], or [layers, size] for a vector; outside a stack `layers` is 1.
    """
    stacked = axes(path)[0] == "layers"
    layers = a.shape[0] if stacked else 1
    inner = a.shape[1:] if stacked else a.shape
    if len(inner) < 2 or path.endswith(("/bias", "scale")):  # a bias or scale may have a dimension for heads
        return a.reshape(layers, -1)
    if path.endswith("/out/kernel"):  # an output projection has its heads on the input side
        return a.reshape(layers, -1, a.shape[-1])
    return a.reshape(layers, inner[0], -1)


def together(paths) -> dict[str, list[str]]:
    """Groups the paths of parameters that share one matrix in PyTorch, by a name for each group.

    `torch.nn.TransformerEncoderLayer` keeps queries, keys and values together. Every other path is alone.
    """
    found = {}
    for path in sorted(paths):
        name = re.sub(r"(adapter/layer/attention)/(query|key|value)/", r"\1/in_proj/", path)
        found.setdefault(name, []).append(path)
    return found


def per_matrix(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies an Optax rule to the matrix of each layer alone, as PyTorch keeps it.

    This is for rules whose result depends on the whole array, like Adafactor's factors and parameter sizes.
    """

    def side_by_side(arrays, paths):
        return jnp.concatenate([matrices(path, arrays[path]) for path in paths], axis=-1)

    def init(params):
        return {
            name: jax.vmap(rule.init)(side_by_side(params, paths)) for name, paths in together(params).items()
        }

    def update(updates, state, params):
        found = {}
        for name, paths in together(updates).items():
            joined, joined_state = jax.vmap(rule.update)(
                side_by_side(updates, paths), state[name], side_by_side(params, paths)
            )
            found |= dict(zip(paths, jnp.split(joined, len(paths), axis=-1), strict=True))
            state = {**state, name: joined_state}
        return {path: found[path].reshape(u.shape) for path, u in updates.items()}, state

    return optax.GradientTransformation(init, update)


def adafactor(rate, c):
    """Adafactor as transformers' `Adafactor(relative_step=False)`.

    Updates are scaled by parameter size and clipped at 1, every matrix is factored, there is no momentum.
    """
    return per_matrix(optax.adafactor(rate, min_dim_size_to_factor=1))


RULES = {
    "adamw": lambda rate, c: optax.adamw(rate, b2=c.beta2, weight_decay=c.weight_decay, mask=decayed),
    "adafactor": adafactor,
}


def make_optimizer(c: OptimizerConfig, steps: int, train_parts) -> optax.GradientTransformation:
    """Clips by the global norm, applies the rule `c.name`, then each parameter's factor in `train_parts`."""

    def scale(updates, state, params=None):
        return {path: u * factor(train_parts, path) for path, u in updates.items()}, state

    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    return optax.chain(
        clip,
        RULES[c.name](schedule(c, steps), c),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
    )
