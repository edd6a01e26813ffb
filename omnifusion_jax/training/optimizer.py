"""Optimizers and learning-rate schedules, built from Optax."""

import math
import re

import jax
import jax.numpy as jnp
import optax

from omnifusion_jax.config import OptimizerConfig, check
from omnifusion_jax.models.axes import axes
from omnifusion_jax.training.freeze import factor
from omnifusion_jax.training.moments import kept

# Whether weight decay pulls a parameter towards zero. It is meant for what multiplies features: kernels and
# embedding tables, as in transformers' trainer. Norms and biases are left alone. So are vectors that are
# added to features or stand among them (positions, tokens, queries), which carry information of their own,
# as in timm; and factors that would switch a part off at zero (layer scale, weights of the mix).
DECAY = [
    (r".*/(kernel|lora_[ab])|decoder/(embed|head)|head", True),  # head: of a bare encoder
    (r"\w+/encoders/\d+/(class_token|registers|position|layers/scale\d)", False),
    (r"\w+/adapter/(queries|mixes/\d+/layers/weight)", False),
    (r"special/\w+", False),
    (r".*/bias", False),
    (r".*(norm\d?/scale|/kernel_(scale|zero|order))", False),
]

# What Muon orthogonalises: the matrices of hidden layers. AdamW has the rest, as Muon's author advises: the
# first layer (patches), embedding tables, heads, and all that is no matrix.
ORTHOGONAL = r"(?!.*/patch/).*/(kernel|lora_[ab])"


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


def sides(path: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions of a parameter that PyTorch's matrix has as inputs, and those that it has as outputs.

    The dimension of a stack's layers is neither. A vector has no inputs.
    """
    inner = tuple(range(ndim))[axes(path)[0] == "layers" :]
    if len(inner) < 2 or path.endswith(("/bias", "scale")):  # a bias or scale may have a dimension for heads
        return (), inner
    # an output projection has its heads on the input side; a first factor's only output is its rank
    cut = -1 if path.endswith(("/out/kernel", "/lora_a")) else 1
    return inner[:cut], inner[cut:]


def matrices(path: str, a: jax.Array) -> jax.Array:
    """A parameter as one matrix per layer, as PyTorch keeps it.

    The result is [layers, in, out], or [layers, size] for a vector; outside a stack `layers` is 1.
    """
    layers = a.shape[0] if axes(path)[0] == "layers" else 1
    ins, _ = sides(path, a.ndim)
    shape = (layers, math.prod(a.shape[i] for i in ins), -1) if ins else (layers, -1)
    return a.reshape(shape)


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


def muon(rate, c):
    """Muon for the matrices of hidden layers, each layer's alone, and AdamW for every other parameter.

    Updates of matrices have the size of AdamW's, a root mean square of 0.2 (arXiv 2502.16982), so that both
    learn at one rate. Queries, keys and values are matrices of their own.
    """

    def rule(params):
        hidden = lambda path: re.fullmatch(ORTHOGONAL, path)
        return {path: "muon" if hidden(path) else "adamw" for path in params}

    def shapes(arrays):  # of those that AdamW has, nothing but a MaskedNode is there
        masked = lambda a: isinstance(a, optax.MaskedNode)
        dimensions = lambda path, a: optax.contrib.MuonDimensionNumbers(*sides(path, a.ndim))
        return {path: a if masked(a) else dimensions(path, a) for path, a in arrays.items()}

    def resize(updates, state, params=None):
        def size(path, a):
            ins, outs = (math.prod(a.shape[i] for i in side) for side in sides(path, a.ndim))
            return 0.2 * max(ins, outs) ** 0.5

        own = {path for path, name in rule(updates).items() if name == "muon"}
        return {path: a * size(path, a) if path in own else a for path, a in updates.items()}, state

    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=shapes)
    return optax.chain(
        optax.partition({"muon": muon, "adamw": optax.scale_by_adam(b2=c.beta2)}, rule),
        optax.GradientTransformation(lambda params: optax.EmptyState(), resize),
        optax.add_decayed_weights(c.weight_decay, decayed),
        optax.scale_by_learning_rate(rate),
    )


RULES = {
    "adamw": lambda rate, c: optax.adamw(rate, b2=c.beta2, weight_decay=c.weight_decay, mask=decayed),
    "adafactor": adafactor,
    "lion": lambda rate, c: optax.lion(rate, weight_decay=c.weight_decay, mask=decayed),
    "muon": muon,
}


def make_optimizer(c: OptimizerConfig, steps: int, train_parts) -> optax.GradientTransformation:
    """Clips by the global norm, applies the rule `c.name`, then each parameter's factor in `train_parts`.

    Moments are kept as `c.moments`.
    """

    def scale(updates, state, params=None):
        return {path: u * factor(train_parts, path) for path, u in updates.items()}, state

    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    return optax.chain(
        clip,
        kept(c.moments, RULES[c.name](schedule(c, steps), c)),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
    )
