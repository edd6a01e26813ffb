"""The formula of floating-point operations, against what XLA counts in programs without loops.

Nothing runs or is compiled: models are large enough for elementwise work to vanish beside matrix products.
One layer each, since XLA counts the body of a loop once; and full attention, which the dense kernel computes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnifusion_jax.batch import FEATURE, TEXT, Batch
from omnifusion_jax.config import DecoderConfig, EncoderConfig, ImageConfig, ModelConfig, adapter
from omnifusion_jax.models import flops
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec
from omnifusion_jax.tables import ADAPTERS, OBJECTIVES
from omnifusion_jax.training import freeze

ROWS, LENGTH, PICTURES = 4, 256, 3  # a block of queries, so that each sees every key
FIRST = EncoderConfig(image_size=224, width=2048, layers=1, heads=2, mlp=4096, feature_layer=-1)
SECOND = dataclasses.replace(FIRST, image_size=196, width=1024, heads=1, activation="swiglu", registers=2)
DECODER = DecoderConfig(
    vocab=8000, width=2048, layers=1, heads=4, kv_heads=2, head_dim=1024, mlp=4096, window=None
)
JOINS = {
    "linear": {},
    "mlp": {"mlp": 3072},
    "transformer": {"heads": 2, "dropout": 0.0},
    "resampler": {"heads": 2, "queries": 144},
    "concat": {"heads": 2, "dropout": 0.0},
    "sum": {},
    "attention": {"heads": 2},
}
ONCE = {"resampler": 144, "attention": 576}  # queries that are mapped once a batch


def model(kind="transformer", tied=False):
    encoders = (FIRST, SECOND)[: ADAPTERS[kind].encoders]
    return ModelConfig(
        image=ImageConfig(encoders, adapter(kind, **JOINS[kind])),
        decoder=dataclasses.replace(DECODER, tied=tied),
    )


def batch(c):
    """Shapes of a batch whose pictures lie in one pool."""
    plane = lambda dtype: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype)
    views = tuple(
        jax.ShapeDtypeStruct((1, PICTURES, view.size, view.size, 3), jnp.uint8) for view in c.image.views
    )
    columns = [plane(jnp.float32 if name == "weights" else jnp.int32) for name in Batch._fields[:6]]
    return Batch(*columns, jax.ShapeDtypeStruct((ROWS,), jnp.int32), {"image": views})


def square(c):
    """The Load of that batch, with attention to everything."""
    return flops.Load(ROWS * LENGTH, ROWS * LENGTH**2, {"image": PICTURES})


def counted(program, *arguments):
    return jax.jit(program).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("kind", JOINS)
def test_a_forward_pass_is_that_of_xla_part_by_part(kind):
    c = model(kind)
    module, given = abstract(c), batch(c)
    found = {part: sum(products) for part, products in flops.forward(c, square(c)).items()}
    flat = [jax.ShapeDtypeStruct(view.shape[1:], view.dtype) for view in given.media["image"]]
    read = lambda stream, media: stream.adapter.read(stream.encoders, media)
    features = jax.eval_shape(read, module.image, flat)
    through = counted(read, module.image, flat), counted(lambda a, x: a(x), module.image.adapter, features)
    encoders = sum(found[part] for part in found if "encoders" in part)
    ours = encoders, found["image/adapter"] + 2 * ONCE.get(kind, 0) * 2048**2
    if kind in ("sum", "attention"):  # which map hidden states while the encoders run
        through, ours = (sum(through),), (sum(ours),)
    np.testing.assert_allclose(ours, through, rtol=0.01)
    hidden = jax.ShapeDtypeStruct((ROWS, LENGTH, c.decoder.width), jnp.float32)
    np.testing.assert_allclose(found["head"], counted(lambda d, x: d.logits(x), module.decoder, hidden), 0.01)
    everything = counted(lambda m, b: m(b), module, given)
    np.testing.assert_allclose(sum(ours) + found["decoder"] + found["head"], everything, rtol=0.01)


PHASES = {
    "phase 1": (("(image/adapter|special)/.*", 1.0), ("(image/encoders|decoder)/.*", None)),
    "phase 2": (("(image/adapter|special|decoder)/.*", 1.0), ("image/encoders/.*", None)),
    "everything": ((".*", 1.0),),
    "the decoder alone": (("decoder/(layers|norm|head).*", 1.0), ("(image|special|decoder/embed).*", None)),
    "the head alone": (("decoder/head", 1.0), ("(image|special|decoder/(embed|layers|norm)).*", None)),
}


@pytest.mark.parametrize("kind", ["linear", "transformer"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_step_is_that_of_xla(phase, kind):
    """Without remat, and with the loss in one piece."""
    c = model(kind)
    skeleton = abstract(c)
    trained, frozen = freeze.split(PHASES[phase], nnx.parameters(skeleton))

    def loss(trained, frozen, batch):
        module = nnx.with_parameters(skeleton, {**trained, **frozen})
        return OBJECTIVES["answers"].loss(module, batch, None, "none")

    found = flops.step(c, square(c), flops.trained_shares(c, trained, frozen))
    theirs = counted(jax.value_and_grad(loss, has_aux=True), trained, frozen, batch(c))
    np.testing.assert_allclose(sum(found.values()), theirs, rtol=0.01)


def test_a_tied_head_is_trained_with_the_table():
    c = model(tied=True)
    trained, frozen = freeze.split(PHASES["phase 2"], nnx.parameters(abstract(c)))
    tied = flops.step(c, square(c), flops.trained_shares(c, trained, frozen))
    c.decoder.tied = False
    trained, frozen = freeze.split(PHASES["phase 2"], nnx.parameters(abstract(c)))
    assert tied == flops.step(c, square(c), flops.trained_shares(c, trained, frozen))


def test_layers_count_as_often_as_they_run():
    """A depth that features are read from, and all of them where all are mixed."""
    c = preset("omnifusion-1.1")
    encoder = dataclasses.replace(c.image.encoders[0])
    of = lambda **changes: flops.of_encoder(dataclasses.replace(encoder, **changes), c.image)
    assert of(layers=24, feature_layer=-2) == of(layers=23, feature_layer=-1) == of(feature_layer=23)
    np.testing.assert_allclose(of(feature_layer=-1).inner / of(feature_layer=1).inner, 24)
    mixed = preset("omnifusion-1.1-mix")
    assert flops.of_encoder(mixed.image.encoders[0], mixed.image) == of(feature_layer=-1)
    decoder = c.decoder
    one = dataclasses.replace(decoder, layers=1)
    assert flops.per_token(decoder) == 32 * flops.per_token(one)
    assert flops.per_pair(decoder) == 32 * flops.per_pair(one)


def test_published_sizes():
    """Six operations a parameter and token: Mistral-7B without its table of embeddings."""
    c = preset("omnifusion-1.1")
    load = flops.Load(1, 0, {})
    found = flops.step(c, load, {"decoder": 1.0, "head": 1.0, "image/adapter": 1.0})
    kernels = 7_241_732_096 - 32_000 * 4096 - 65 * 4096  # all but the table and the norms
    assert found["decoder"] + found["head"] == 6 * kernels
    assert found["image/encoders/0"] == found["image/adapter"] == 0


def test_pairs_are_those_that_the_mask_lets_through():
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 3, 3, 3, 3, 3]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 0, 1, 2, 3, 4]], np.int32)
    for window in (None, 1, 3):
        mask = AttentionSpec.of(segments, positions, window).mask()
        assert flops.pairs(positions, segments, window) == mask.sum()


def test_a_batch_counts_without_its_padding():
    """Two pools of two rows with room for three tiles: three are shown in the first, one in the second."""
    c = tiny.config()
    c.decoder.window, rows = None, c.image.rows
    segments = np.zeros((4, 4 * rows), np.int32)
    lengths = [2 * rows + 1, rows + 2, 5, rows]
    for row, length in enumerate(lengths):
        segments[row, :length] = 1
    kind, index = segments * TEXT, np.zeros_like(segments)
    kind[0, 1 : 2 * rows + 1], index[0, 1 : 2 * rows + 1] = FEATURE, np.arange(2 * rows)
    kind[1, :rows], index[1, :rows] = FEATURE, np.arange(rows)[::-1] + 2 * rows
    kind[3, :rows], index[3, :rows] = FEATURE, np.arange(rows)
    positions = np.tile(np.arange(4 * rows, dtype=np.int32), (4, 1))
    media = {"image": (np.zeros((2, 3, 8, 8, 3), np.uint8),)}
    given = Batch(segments, kind, index, segments, segments, positions, np.array([2, 1, 0, 1]), media)
    found = jax.jit(lambda batch: flops.load(c, batch))(given)
    assert found.tokens == sum(lengths) and found.tiles == {"image": 4}
    assert found.pairs == sum(n * (n + 1) / 2 for n in lengths)
    empty = given._replace(kind=segments * TEXT, media={"image": (np.zeros((2, 0, 8, 8, 3), np.uint8),)})
    assert flops.load(c, empty).tiles == {"image": 0}


def test_a_kind_of_ones_own_counts_its_parameters(monkeypatch):
    c = tiny.config()
    c.image.adapter = adapter("linear")
    known = flops.of_adapter(c.image, c.decoder.width)
    monkeypatch.delitem(flops.OF_ADAPTERS, "linear")
    found = flops.of_adapter(c.image, c.decoder.width)
    np.testing.assert_allclose(sum(found), sum(known), rtol=0.05)  # its bias is among them
