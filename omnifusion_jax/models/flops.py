"""Floating-point operations of a model, from its config and from what it is given: the formula behind MFU.

Matrix products count, 2 * m * k * n each; what is done element by element does not (under a percent at real
sizes). Causal attention counts the pairs that a mask lets through, about half of a square, whatever a kernel
computes. What is computed again for the backward pass (remat) does not count. A part costs

- its forward pass, always;
- once more the products with its parameters, for the gradients of those that are trained;
- once more these products and twice its attention, for the gradients of activations, where something is
  trained in the part or before it. A frozen encoder therefore costs a forward pass, and a frozen decoder
  behind a trained adapter costs two.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from omnifusion_jax.batch import FEATURE, PADDING, Batch
from omnifusion_jax.config import DecoderConfig, EncoderConfig, ModelConfig, StreamConfig, part_of
from omnifusion_jax.models.adapters.mixed import MixSettings
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.feed_forward import GATES
from omnifusion_jax.tables import ADAPTERS, ENCODERS


class Load(NamedTuple):
    """What a model is given."""

    tokens: float  # positions of the decoder, without padding
    pairs: float  # a query and a key that it sees, in one layer of the decoder; see `pairs`
    tiles: Mapping[str, float]  # {stream: tiles of its media}
    features: Collection[str] = ()  # streams whose media come as features, so that no encoder of theirs runs


class Products(NamedTuple):
    """Floating-point operations of a forward pass."""

    entry: float  # of the part's input with parameters
    inner: float  # other products with parameters
    mixing: float  # of activations with each other, in attention

    def times(self, n: float) -> "Products":
        return Products(*(n * x for x in self))

    def step(self, share: float, before: bool) -> float:
        """Those of a training step.

        Args:
          share: of the part's parameters that is trained.
          before: whether something is trained that the part's input depends on.
        """
        weights = self.entry + self.inner
        forward = weights + self.mixing
        through = self.inner + 2 * self.mixing if share or before else 0.0
        return forward + share * weights + through + before * self.entry


def step(c: ModelConfig, load: Load, shares: Mapping[str, float]) -> dict[str, float]:
    """Floating-point operations of a training step by part: encoders, adapters, decoder, head.

    The parts are those of `forward`; `shares` are what `trained_shares` gives.
    """
    found = forward(c, load)
    joins = [part for part in shares if part not in ("decoder", "head")]
    before = {"decoder": joins, "head": [*joins, "decoder"]}
    for name in c.streams:
        before[f"{name}/adapter"] = [part for part in joins if part.startswith(f"{name}/encoders/")]
    active = {part for part, share in shares.items() if share}
    return {
        part: products.step(shares.get(part, 0.0), not active.isdisjoint(before.get(part, ())))
        for part, products in found.items()
    }


def forward(c: ModelConfig, load: Load) -> dict[str, Products]:
    """The Products of a forward pass by part.

    Parts are named as in `ModelConfig.parts` (image/encoders/0, image/adapter, decoder), without the special
    vectors, and the head apart from the decoder.
    """
    found = {}
    for name, stream in c.streams.items():
        tiles = load.tiles.get(name, 0)
        if name not in load.features:
            for i, encoder in enumerate(stream.encoders):
                found[f"{name}/encoders/{i}"] = of_encoder(encoder, stream).times(tiles)
        found[f"{name}/adapter"] = of_adapter(stream, c.decoder.width).times(tiles)
    d = c.decoder
    found["decoder"] = Products(0.0, load.tokens * per_token(d), load.pairs * per_pair(d))
    found["head"] = Products(load.tokens * 2 * d.width * d.vocab, 0.0, 0.0)
    return found


def sums(found: Mapping[str, float]) -> dict[str, float]:
    """What `step` gives, of all encoders and of all adapters together: encoder, adapter, decoder, head."""
    added = dict.fromkeys(("encoder", "adapter", "decoder", "head"), 0.0)
    for part, value in found.items():
        kind = part.split("/")[1].rstrip("s") if "/" in part else part
        added[kind] += value
    return added


def trained_shares(c: ModelConfig, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, float]:
    """The trained share of the parameters of each part, from two dicts of arrays (or shapes) by path.

    The head and the embedding table are parts of their own; a tied head is that table.
    """
    sizes, learning = {}, {}
    for arrays, counts in ((trained, True), (frozen, False)):
        for path, a in arrays.items():
            part = {"decoder/head": "head", "decoder/embed": "embed"}.get(path) or part_of(path)
            sizes[part] = sizes.get(part, 0) + a.size
            learning[part] = learning.get(part, 0) + counts * a.size
    found = {part: learning[part] / size for part, size in sizes.items() if size}
    return found | ({"head": found["embed"]} if c.decoder.tied and "embed" in found else {})


def load(c: ModelConfig, batch: Batch, features: Collection[str] = ()) -> Load:
    """What a Batch is for a model, in numbers of float32; padding and blank tiles are left out.

    `features`: streams whose media come as features.
    """
    return Load(
        tokens=(batch.kind != PADDING).astype(jnp.float32).sum(),
        pairs=pairs(batch.positions, batch.segments, c.decoder.window),
        tiles={
            name: tiles(batch, FEATURE + number, stream.rows, len(batch.media[name][0]))
            for number, (name, stream) in enumerate(c.streams.items())
        },
        features=features,
    )


def tiles(batch: Batch, kind: int, rows: int, pools: int):
    """How many tiles positions of a kind show, float32: in each pool those up to the last one shown."""
    shown = jnp.where(batch.kind == kind, batch.index // rows + 1, 0)  # [batch, seq]
    return shown.max(axis=1).reshape(pools, -1).max(axis=1).astype(jnp.float32).sum()


def pairs(positions, segments, window: int | None):
    """How many (query, key) pairs causal attention within segments sees, float32.

    positions and segments are those of a Batch, [batch, seq]; a token sees its own position and those before
    it in its segment, at most `window` of them.
    """
    seen = jnp.minimum(positions + 1, window) if window else positions + 1
    return jnp.where(segments > 0, seen, 0).astype(jnp.float32).sum()


def per_token(d: DecoderConfig) -> float:
    """Products of a token with the parameters of all layers: queries and outputs, keys and values, SwiGLU."""
    attention = 2 * d.width * d.head_dim * (d.heads + d.kv_heads)
    return 2.0 * d.layers * (attention + 3 * d.width * d.mlp)


def per_pair(d: DecoderConfig) -> float:
    """The score of a query and a key, and the value added by it, in all heads and layers."""
    return 4.0 * d.layers * d.heads * d.head_dim


def of_encoder(c: EncoderConfig, stream: StreamConfig) -> Products:
    """The Products of an encoder for a tile. Blocks above the layer that is read do not run."""
    if c.kind not in OF_ENCODERS:
        return by_parameters(lambda: ENCODERS[c.kind](c, rngs=nnx.Rngs(0)), c.rows)
    depth = c.feature_layer if c.feature_layer >= 0 else c.layers + 1 + c.feature_layer
    return OF_ENCODERS[c.kind](c, c.layers if isinstance(stream.adapter, MixSettings) else depth)


def of_adapter(c: StreamConfig, width: int) -> Products:
    """The Products of an adapter for a tile."""
    if c.adapter.kind not in OF_ADAPTERS:
        return by_parameters(lambda: ADAPTERS[c.adapter.kind](c, width, rngs=nnx.Rngs(0)), c.rows)
    return OF_ADAPTERS[c.adapter.kind](c, width)


def by_parameters(make, rows: int) -> Products:
    """An estimate for a kind that has no formula here: every parameter meets every feature row once."""
    return Products(0.0, 2.0 * rows * sum(a.size for a in nnx.parameters(nnx.eval_shape(make)).values()), 0.0)


def vit(c: EncoderConfig, depth: int) -> Products:
    rows = c.class_token + c.registers + c.patches
    maps = 3 if c.activation in GATES else 2
    return Products(
        entry=2.0 * c.patches * 3 * c.patch**2 * c.width,
        inner=2.0 * rows * depth * c.width * (4 * c.width + maps * c.mlp),
        mixing=4.0 * rows**2 * depth * c.width,
    )


def linear(c, width):
    return Products(2.0 * c.rows * c.encoders[0].width * width, 0.0, 0.0)


def mlp(c, width):
    hidden = 2.0 * c.rows * c.adapter.mlp
    return Products(hidden * c.encoders[0].width, hidden * width, 0.0)


def layer(c, inner, width):
    """A transformer layer and a linear map; queries, keys and values are made of its input."""
    after = inner * (inner + 2 * c.adapter.mlp + width)
    return Products(2.0 * c.rows * 3 * inner**2, 2.0 * c.rows * after, 4.0 * c.rows**2 * inner)


def transformer(c, width):
    return layer(c, c.encoders[0].width, width)


def concat(c, width):
    inner = c.adapter.width or c.encoders[0].width
    ins, *rest = layer(c, inner, width)
    return Products(sum(2.0 * e.rows * e.width * inner for e in c.encoders), ins + rest[0], rest[1])


def mixes(c, inner):
    """The map of each hidden state of each encoder."""
    states = lambda e: e.layers + 1 - c.adapter.first_state
    return sum(2.0 * e.rows * states(e) * e.width * inner for e in c.encoders)


def summed(c, width):
    inner = c.adapter.width or c.encoders[0].width
    return Products(mixes(c, inner), 2.0 * c.rows * inner * width, 0.0)


def attention(c, width):
    """Trained queries are mapped once a batch, which does not count."""
    inner, keys = c.adapter.width or c.encoders[0].width, sum(e.rows for e in c.encoders)
    maps = 2 * keys * inner**2 + c.rows * inner * (inner + width)
    return Products(mixes(c, inner), 2.0 * maps, 4.0 * c.rows * keys * inner)


def resampler(c, width):
    """Trained queries are mapped once a batch, which does not count."""
    keys, inner = c.encoders[0].rows, c.encoders[0].width
    projected = 2.0 * keys * inner * width if inner != width else 0.0
    maps, read = 2.0 * 2 * c.rows * width**2, 2.0 * 2 * keys * width**2
    entry, inside = (projected, read) if projected else (read, 0.0)
    return Products(entry, inside + maps, 4.0 * c.rows * keys * width)


# Formulas by kind. A kind of one's own may have one here: (its config, blocks that run) or (stream, width)
OF_ENCODERS = {"vit": vit}
OF_ADAPTERS = {
    "linear": linear,
    "mlp": mlp,
    "transformer": transformer,
    "concat": concat,
    "sum": summed,
    "attention": attention,
    "resampler": resampler,
}
