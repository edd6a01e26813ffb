"""The logical axes of every parameter, by path."""

import re

import jax

from omnifusion_jax import sharding
from omnifusion_jax.config import check

# A dimension named "_" stays whole on each device. If your own module has parameters with other names, add
# rows for them: AXES.append((pattern, names)).
AXES = [
    (r"\w+/encoders/\d+/patch/kernel", "_ _ _ vision_embed"),
    (r"\w+/encoders/\d+/(class_token|patch/bias|(pre|post)_norm/(scale|bias))", "_"),
    (r"\w+/encoders/\d+/(position|registers)", "_ vision_embed"),
    (r"\w+/encoders/\d+/layers/attention/(query|key|value)/kernel", "layers vision_embed heads head_dim"),
    (r"\w+/encoders/\d+/layers/attention/(query|key|value)/bias", "layers heads head_dim"),
    (r"\w+/encoders/\d+/layers/attention/(query|key)_norm/scale", "layers heads head_dim"),
    (r"\w+/encoders/\d+/layers/attention/out/kernel", "layers heads head_dim vision_embed"),
    (r"\w+/encoders/\d+/layers/feed_forward/(gate|up)/kernel", "layers vision_embed vision_mlp"),
    (r"\w+/encoders/\d+/layers/feed_forward/down/kernel", "layers vision_mlp vision_embed"),
    (
        r"\w+/encoders/\d+/layers/"
        r"((feed_forward/(gate|up|down)|attention/out)/bias|scale\d|norm\d/(scale|bias))",
        "layers _",
    ),
    (r"\w+/adapter/(layer/)?attention/(query|key|value)/kernel", "vision_embed heads head_dim"),
    (r"\w+/adapter/(layer/)?attention/(query|key|value)/bias", "heads head_dim"),
    (r"\w+/adapter/(layer/)?attention/out/kernel", "heads head_dim vision_embed"),
    (r"\w+/adapter/queries", "_ vision_embed"),
    (r"\w+/adapter/(layer/feed_forward/)?up/kernel", "vision_embed vision_mlp"),
    (r"\w+/adapter/layer/feed_forward/down/kernel", "vision_mlp vision_embed"),
    (r"\w+/adapter/linear/kernel", "_ width"),
    (r"\w+/adapter/(projection|projections/\d+)/kernel", "vision_embed _"),
    (r"\w+/adapter/mixes/\d+/layers/kernel", "layers vision_embed _"),
    (r"\w+/adapter/mixes/\d+/layers/weight", "layers"),
    (r"\w+/adapter/mixes/\d+/layers/(bias|norm/(scale|bias))", "layers _"),
    (
        r"\w+/adapter/"
        r"(mixes/\d+|projections/\d+|(layer/)?attention/out|"
        r"(layer/feed_forward/)?up|layer/feed_forward/down|linear)"
        r"/bias",
        "_",
    ),
    (r"\w+/adapter/(layer/|mixes/\d+/)?(\w+_)?norm\d?/(scale|bias)", "_"),
    (r"special/\w+", "_"),
    (r"decoder/embed(_scale)?", "vocab width"),
    (r"decoder/head(_scale)?", "width vocab"),
    (r"decoder/layers/attention/query/kernel(_scale|_zero)?", "layers width kv_heads group head_dim"),
    (r"decoder/layers/attention/query/bias", "layers kv_heads group head_dim"),
    (r"decoder/layers/attention/(key|value)/kernel(_scale|_zero)?", "layers width kv_heads head_dim"),
    (r"decoder/layers/attention/(key|value)/bias", "layers kv_heads head_dim"),
    (r"decoder/layers/attention/out/kernel(_scale|_zero)?", "layers kv_heads group head_dim width"),
    (r"decoder/layers/attention/out/kernel_order", "layers _ _ _"),
    (r"decoder/layers/(attention/(query|key|value)|feed_forward/\w+)/kernel_order", "layers _"),
    (r"decoder/layers/attention/(query|key)_norm/scale", "layers head_dim"),
    (r"decoder/layers/feed_forward/(gate|up)/kernel(_scale|_zero)?", "layers width mlp"),
    (r"decoder/layers/feed_forward/down/kernel(_scale|_zero)?", "layers mlp width"),
    (r"decoder/layers/attention/(query|key|value)/lora_a", "layers width _"),
    (r"decoder/layers/attention/query/lora_b", "layers rank kv_heads group head_dim"),
    (r"decoder/layers/attention/(key|value)/lora_b", "layers rank kv_heads head_dim"),
    (r"decoder/layers/attention/out/lora_a", "layers kv_heads group head_dim rank"),
    (r"decoder/layers/attention/out/lora_b", "layers _ width"),
    (r"decoder/layers/feed_forward/(gate|up)/lora_a", "layers width _"),
    (r"decoder/layers/feed_forward/(gate|up)/lora_b", "layers rank mlp"),
    (r"decoder/layers/feed_forward/down/lora_a", "layers mlp rank"),
    (r"decoder/layers/feed_forward/down/lora_b", "layers _ width"),
    # where a model answers, see checkpoints/joined.py
    (r"decoder/layers/attention/joined/kernel(_scale|_zero)?", "layers width kv_heads _ head_dim"),
    (r"decoder/layers/attention/joined/bias", "layers kv_heads _ head_dim"),
    (r"decoder/layers/feed_forward/joined/kernel(_scale|_zero)?", "layers width _ mlp"),
    (r"decoder/layers/(attention|feed_forward)/joined/lora_a", "layers width _"),
    (r"decoder/layers/attention/joined/lora_b", "layers rank kv_heads _ head_dim"),
    (r"decoder/layers/feed_forward/joined/lora_b", "layers rank _ mlp"),
    (r"decoder/layers/norm\d/scale", "layers _"),
    (r"decoder/norm/scale", "_"),
    (r"head", "vision_embed _"),
]


def axes(path: str) -> list[str]:
    """Names of the dimensions of the parameter at `path`.

    One of a layer that stands apart has those of the stack but the first.

    Raises:
      ConfigError: not exactly one row of AXES matches the path.
    """
    stack = re.sub(r"^(decoder/layers/)\d+/", r"\1", path)
    if stack != path:
        return axes(stack)[1:]
    hits = [names.split() for pattern, names in AXES if re.fullmatch(pattern, path)]
    check(
        len(hits) == 1,
        f"{path}: {len(hits)} rows of models.axes.AXES match, exactly one must. Append one, or correct it",
    )
    return hits[0]


def placements(mesh, arrays):
    """{path: NamedSharding} for parameters by path, which are arrays or anything else with a shape."""
    return {path: sharding.sharding(mesh, axes(path), a.shape) for path, a in arrays.items()}


def spread(arrays):
    """Keeps parameters, {path: array}, spread by their logical axes inside a program, and so their gradients.

    Under `jax.set_mesh`; without a mesh nothing changes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    return {path: sharding.constrain(a, *axes(path)) for path, a in arrays.items()}
