"""Optimizers and schedules, all of them Optax's."""

import re

import jax
import jax.numpy as jnp
import optax

from omnifusion_jax.config import OptimizerConfig, check
from omnifusion_jax.models.axes import axes
from omnifusion_jax.training.freeze import factor

# Whether weight decay pulls a parameter to zero. It is for what multiplies features: kernels and embedding
# tables, as in transformers' trainer. Norms and biases keep their level. Vectors that are added to features
# or stand among them (positions, tokens, queries) carry information of their own, as in timm. Factors whose
# zero would switch a part off (layer scale, weights of the mix) are left alone too.
DECAY = [
    (r".*/kernel|decoder/(embed|head)|head", True),  # head: of a bare encoder
    (r"image/encoders/\d+/(class_token|registers|position|layers/scale\d)", False),
    (r"image/adapter/(queries|mixes/\d+/layers/weight)", False),
    (r"special/\w+", False),
    (r".*/bias", False),
    (r".*norm\d?/scale", False),
]


def decays(path):
    """Whether weight decay touches the parameter at `path`. Raises ConfigError unless exactly one row of DECAY matches."""
    hits = [answer for pattern, answer in DECAY if re.fullmatch(pattern, path)]
    check(
        len(hits) == 1,
        f"{path}: {len(hits)} rows of training.optimizer.DECAY match, exactly one must. Append one, or correct it",
    )
    return hits[0]


def decayed(params):
    return {path: decays(path) for path in params}


def schedule(c: OptimizerConfig, steps):
    """Step to learning rate: linear warm-up over a share of the horizon, then a cosine to zero or a constant.

    The horizon is `c.horizon * steps`. The published code counts the batches of every device, so that on 8 devices
    its runs end at an eighth of it.
    """
    horizon = round(c.horizon * steps)
    warmup = round(c.warmup * horizon)
    main = {
        "cosine": lambda: optax.cosine_decay_schedule(c.learning_rate, max(1, horizon - warmup)),
        "constant": lambda: optax.constant_schedule(c.learning_rate),
    }[c.schedule]()
    return (
        optax.join_schedules([optax.linear_schedule(0.0, c.learning_rate, warmup), main], [warmup])
        if warmup
        else main
    )


def matrices(path, a):
    """A parameter as [layers, in, out] (vectors: [layers, size]): one matrix a layer, as PyTorch keeps it. `layers` is 1 outside a stack."""
    names = axes(path)
    layers = a.shape[0] if names[0] == "layers" else 1
    inner = a.shape[1:] if names[0] == "layers" else a.shape
    if len(inner) < 2 or path.endswith(("/bias", "scale")):  # vectors elsewhere, whose heads are apart here
        return a.reshape(layers, -1)
    # heads are on the input side of an output projection, else on the output side
    into = a.shape[-1] if path.endswith("/out/kernel") else None
    return a.reshape(layers, -1, into) if into else a.reshape(layers, inner[0], -1)


def together(paths):
    """Lists of paths by name. `torch.nn.TransformerEncoderLayer` keeps queries, keys and values in one matrix; else a
    path is alone."""
    found = {}
    for path in sorted(paths):
        found.setdefault(
            re.sub(r"(adapter/layer/attention)/(query|key|value)/", r"\1/in_proj/", path), []
        ).append(path)
    return found


def per_matrix(rule):
    """Applies an Optax rule to each layer's matrix alone, as PyTorch keeps it: for rules whose result depends on the
    whole array, as Adafactor's factors and sizes."""

    def side_by_side(arrays, paths):
        return jnp.concatenate([matrices(path, arrays[path]) for path in paths], axis=-1)

    def init(params):
        return {
            name: jax.vmap(rule.init)(side_by_side(params, paths)) for name, paths in together(params).items()
        }

    def update(updates, state, params):
        found = {}
        for name, paths in together(updates).items():
            one, state_of_one = jax.vmap(rule.update)(
                side_by_side(updates, paths), state[name], side_by_side(params, paths)
            )
            found |= dict(zip(paths, jnp.split(one, len(paths), axis=-1), strict=True))
            state = {**state, name: state_of_one}
        return {path: found[path].reshape(u.shape) for path, u in updates.items()}, state

    return optax.GradientTransformation(init, update)


def adafactor(rate, c):
    """As transformers' `Adafactor(relative_step=False)`: scaled by parameter size, update clipped at 1, every matrix factored, no momentum."""
    return per_matrix(optax.adafactor(rate, min_dim_size_to_factor=1))


RULES = {
    "adamw": lambda rate, c: optax.adamw(rate, b2=c.beta2, weight_decay=c.weight_decay, mask=decayed),
    "adafactor": adafactor,
}


def make_optimizer(c: OptimizerConfig, steps, train_parts):
    """Clip by global norm, the rule, then the part's own factor."""

    def scale(updates, state, params=None):
        return {path: u * factor(train_parts, path) for path, u in updates.items()}, state

    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    return optax.chain(
        clip,
        RULES[c.name](schedule(c, steps), c),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
    )
