"""The logical axes of every parameter, by path."""

import re

from omnifusion_jax import sharding

AXES = (
    (r"encoders/\d+/patch", "_ _ _ vision_embed"),
    (r"encoders/\d+/(patch_bias|class_token|(pre|post)_norm/(scale|bias))", "_"),
    (r"encoders/\d+/(position|registers)", "_ vision_embed"),
    (r"encoders/\d+/layers/attention/(query|key|value)", "layers vision_embed heads head_dim"),
    (r"encoders/\d+/layers/attention/(query|key|value)_bias", "layers heads head_dim"),
    (r"encoders/\d+/layers/attention/(query|key)_norm/scale", "layers heads head_dim"),
    (r"encoders/\d+/layers/attention/out", "layers heads head_dim vision_embed"),
    (r"encoders/\d+/layers/(gate|up)", "layers vision_embed vision_mlp"),
    (r"encoders/\d+/layers/down", "layers vision_mlp vision_embed"),
    (r"encoders/\d+/layers/.*(gate|up|down|out)_bias", "layers _"),
    (r"encoders/\d+/layers/(scale\d|norm\d/(scale|bias))", "layers _"),
    (r"adapter/qkv", "vision_embed _ heads head_dim"),
    (r"adapter/qkv_bias", "_ heads head_dim"),
    (r"adapter/(query|key|value)", "vision_embed heads head_dim"),
    (r"adapter/(query|key|value)_bias", "heads head_dim"),
    (r"adapter/queries", "_ vision_embed"),
    (r"adapter/out", "heads head_dim vision_embed"),
    (r"adapter/up", "vision_embed vision_mlp"),
    (r"adapter/down", "vision_mlp vision_embed"),
    (r"adapter/linear", "_ embed"),
    (r"adapter/projections/\d+/kernel", "vision_embed _"),
    (r"adapter/mixes/\d+/layers/kernel", "layers vision_embed _"),
    (r"adapter/mixes/\d+/layers/weight", "layers"),
    (r"adapter/mixes/\d+/layers/(bias|norm/(scale|bias))", "layers _"),
    (r"adapter/(mixes/\d+/(bias|norm/(scale|bias))|projections/\d+/bias)", "_"),
    (r"adapter/((out|up|down|linear)_bias|norm\d/(scale|bias))", "_"),
    (r"special/\w+", "_"),
    (r"decoder/embed", "vocab embed"),
    (r"decoder/head", "embed vocab"),
    (r"decoder/layers/attention/query", "layers embed kv_heads group head_dim"),
    (r"decoder/layers/attention/(key|value)", "layers embed kv_heads head_dim"),
    (r"decoder/layers/attention/out", "layers kv_heads group head_dim embed"),
    (r"decoder/layers/(gate|up)", "layers embed mlp"),
    (r"decoder/layers/down", "layers mlp embed"),
    (r"decoder/layers/norm\d/scale", "layers _"),
    (r"decoder/norm/scale", "_"),
    (r"head", "vision_embed _"),
)


def axes(path):
    """Names of the dimensions of the parameter at `path`. Exactly one row must match."""
    hits = [names.split() for pattern, names in AXES if re.fullmatch(pattern, path)]
    assert len(hits) == 1, f"{path}: {len(hits)} rows of AXES match, exactly one must"
    return hits[0]


def placements(mesh, arrays):
    """{path: NamedSharding} of parameters by path (arrays, or anything with a shape)."""
    return {path: sharding.sharding(mesh, axes(path), a.shape) for path, a in arrays.items()}
