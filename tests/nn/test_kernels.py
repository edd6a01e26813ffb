"""Fused attention kernels against the dense one, each run on a CPU as far as it can be: splash and triton
interpreted, cuDNN's by the same call of JAX with XLA behind it."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from omnifusion_jax import sharding
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.nn import loops
from omnifusion_jax.nn.attend import EVERYTHING, AttentionSpec, Places, attend, dense, using
from omnifusion_jax.nn.choice import DECODING, Choice, Kernel, Need
from omnifusion_jax.nn.kernels import few, paged, splash
from omnifusion_jax.nn.kernels.cudnn import cudnn
from omnifusion_jax.nn.kernels.triton import triton
from omnifusion_jax.tables import KERNELS

RUN = {
    "splash": partial(splash.splash, interpret=True),
    "triton": partial(triton, interpret=True),
    "cudnn": partial(cudnn, implementation="xla"),
}
HEADS, GROUP, SIZE = 2, 2, 16


def row(*lengths, of):
    """Segments and positions of a row of `of` tokens: dialogues of these lengths, then padding.

    A length below 0 is padding before them.
    """
    segments, positions, number = [], [], 0
    for n in lengths:
        number += n > 0
        segments += [number if n > 0 else 0] * abs(n)
        positions += list(range(n)) if n > 0 else [0] * -n
    rest = [0] * (of - len(segments))
    return segments + rest, positions + rest


def rows(*lengths, of, window=None):
    segments, positions = zip(*(row(*one, of=of) for one in lengths), strict=True)
    return AttentionSpec.of(np.array(segments, np.int32), np.array(positions, np.int32), window)


ALL, FUSED = ("splash", "triton", "cudnn"), ("splash", "triton")
CASES = {  # name: (spec, queries, keys, kernels that can do it)
    "causal": (rows([128], [128], of=128), 128, 128, ALL),
    "an odd length and padding": (rows([133], [70], of=133), 133, 133, ALL),
    "packed": (rows([100, 90, 60], [3, 250], of=260), 260, 260, FUSED),
    "padding before": (rows([-40, 93], [-1, 132], of=133), 133, 133, FUSED),
    "window": (rows([300], [201], of=300, window=129), 300, 300, ("splash", "cudnn")),
    "packed, window": (rows([100, 190], [270, 17], of=290, window=30), 290, 290, ("splash",)),
    "a window that hides nothing": (rows([100], [80], of=100, window=100), 100, 100, ALL),
    "encoder": (EVERYTHING, 128, 128, ALL),
    "encoder, an odd length": (EVERYTHING, 197, 197, ALL),
    "queries of an adapter": (EVERYTHING, 20, 197, ("splash", "cudnn")),
    "queries of a whole length": (EVERYTHING, 128, 197, ("splash", "cudnn")),
}


def arrays(queries, keys, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch, HEADS, GROUP, queries), (batch, HEADS, keys), (batch, HEADS, keys)
    return [jnp.asarray(rng.normal(size=(*shape, SIZE)), jnp.float32) for shape in shapes]


@partial(jax.jit, static_argnums=0)
def both(kernel, q, k, v, spec):
    """Output, and gradients of q, k and v for random gradients of the tokens that are real."""
    real = True if spec.query is None else (spec.query.segments > 0)[:, None, None, :, None]
    given = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32) * real
    y, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, spec, (0.0, None)), q, k, v)
    return y, y * real, pull(given)


@pytest.mark.parametrize("name, case", [(name, case) for case, (*_, able) in CASES.items() for name in able])
def test_fused_equals_dense(name, case, monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)  # several pieces of a sequence
    spec, queries, keys, _ = CASES[case]
    given = arrays(queries, keys)
    _, expected, gradients = both(dense, *given, spec)
    y, real, found = both(RUN[name], *given, spec)
    assert np.isfinite(y).all()  # padding too
    np.testing.assert_allclose(real, expected, atol=2e-5)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
        if spec.query is not None:  # padding gets no gradient
            assert not (np.abs(a).max((-1, *range(1, a.ndim - 2))) * (spec.query.segments == 0)).any()


def test_splash_computes_long_pieces_at_once():
    """At 577 tokens, padded to 640, there is one piece; the result is the same."""
    given = arrays(577, 577, batch=1)
    _, expected, gradients = both(dense, *given, EVERYTHING)
    _, y, found = both(RUN["splash"], *given, EVERYTHING)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("name, batch", [("splash", 4), ("triton", 4), ("cudnn", 4), ("cudnn", 3)])
def test_many_devices_share_the_work(name, batch):
    """Three rows cannot be shared out, so that each device has them all."""
    spec, given = rows(*([130], [70], [64], [1])[:batch], of=130), arrays(130, 130, batch)
    alone = both(RUN[name], *given, spec)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        together = both(RUN[name], *given, spec)
    rows_over = ("data", "fsdp") if batch == 4 else None
    assert together[0].sharding.spec[:2] == (rows_over, "tensor")
    for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_gradients_of_what_is_shared_out_are_not_summed_over_devices(sizes):
    spec, mesh = rows(*[[60]] * 8, of=64), sharding.make_mesh(**sizes)
    place = lambda a: sharding.sharding(mesh, ("batch", "kv_heads", *[None] * (a.ndim - 2)), a.shape)
    given = [jax.device_put(a, place(a)) for a in arrays(64, 64, batch=8)]
    with jax.set_mesh(mesh):
        text = both.lower(RUN["cudnn"], *given, spec).compile().as_text()
    assert "all-reduce" not in text and "all-gather" not in text


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2}])
def test_paged_equals_dense(mesh):
    """A token of each row, which sees what its row holds; keys and values have the digits of bfloat16."""
    rng, (rows, keys, size) = np.random.default_rng(1), (4, 64, 128)
    made = lambda *shape: jnp.asarray(rng.normal(size=(rows, HEADS, *shape, size)), jnp.bfloat16)
    q, k, v = (a.astype(jnp.float32) for a in (made(GROUP, 1), made(keys), made(keys)))
    at = np.array([0, 30, 31, 63], np.int32)
    columns = np.broadcast_to(np.arange(keys, dtype=np.int32), (rows, keys))
    one = lambda a: np.ones_like(a)
    spec = AttentionSpec(Places(one(at)[:, None], at[:, None]), Places(one(columns), columns), window=keys)
    expected = dense(q, k, v, spec, (0.0, None))
    where = jax.set_mesh(sharding.make_mesh(fsdp=1, **mesh)) if mesh else contextlib.nullcontext()
    with where, pltpu.force_tpu_interpret_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "PAGE", 32)  # several pages of a row
        y = jax.jit(lambda *given: paged.paged(*given, spec, (0.0, None)))(q, k, v)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("queries", [1, 3, 9])
def test_few_equals_dense(monkeypatch, queries):
    """Three queries of each head of keys are summed; of two (a group) and of eighteen there are products."""
    monkeypatch.setattr(few, "WORTH", 4 * HEADS * 40)
    products, rng = [], np.random.default_rng(1)
    monkeypatch.setattr(few, "dense", lambda *given: products.append(queries) or dense(*given))
    made = lambda *shape: jnp.asarray(rng.normal(size=(4, HEADS, *shape, 32)), jnp.float32)
    q, k, v = made(2, queries), made(40), made(40)
    spec = AttentionSpec(seen=jnp.asarray(rng.random((4, queries, 40)) < 0.5).at[:, :, 0].set(True))
    for given in ((q, k, v, spec), (q[:2], k[:2], v[:2], AttentionSpec())):  # half of the keys are too few
        expected = dense(*given, (0.0, None))
        np.testing.assert_allclose(few.few(*given, (0.0, None)), expected, atol=2e-6)
    assert len(products) == (1 if queries in (1, 3) else 2)


def test_triton_is_lowered_for_a_gpu_without_one():
    """At a size of 7B: three kernels, for the output, for what the gradients share, and for the gradients."""
    n, s = 256, jax.ShapeDtypeStruct
    shapes = (2, 8, 4, n, 128), (2, 8, n, 128), (2, 8, n, 128)
    given = [s(shape, jnp.bfloat16) for shape in shapes] + [s((2, n), jnp.int32)] * 2

    def gradients(q, k, v, *places):
        run = lambda *qkv: triton(*qkv, AttentionSpec.of(*places), (0.0, None))
        y, pull = jax.vjp(run, q, k, v)
        return pull(y)

    one = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=one)):
        text = jax.jit(gradients).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3


# --- what is refused

DIALOGUE = Need("bfloat16", 128, 2048, 2048, "later", False, None, 0.0, False)
PACKED = DIALOGUE._replace(packed=True)
TOKEN = DIALOGUE._replace(queries=1, packed=True, cache=True)
PICTURE = Need("bfloat16", 64, 577, 577, "nothing", False, None, 0.0, False)
REFUSED = [
    (("splash", "cudnn", "triton"), DIALOGUE._replace(dropout=0.1), "dropout"),
    (("splash", "cudnn", "triton"), DIALOGUE._replace(hidden="blocks"), "blocks of tokens"),
    (("splash", "cudnn", "triton"), DIALOGUE._replace(queries=1, cache=True), "cache"),
    (("cudnn",), PACKED, "segments, which packed rows need"),
    (("cudnn", "triton"), DIALOGUE._replace(dtype="float32"), "float32"),
    (("cudnn",), DIALOGUE._replace(head_dim=256), "head_dim 256"),
    (("cudnn",), DIALOGUE._replace(head_dim=36), "head_dim 36"),
    (("triton",), DIALOGUE._replace(window=1024), "window 1024"),
    (("triton",), PICTURE._replace(queries=64), "keys of another length"),
    (("paged",), DIALOGUE, "a sequence that attends to itself"),
    (("paged",), TOKEN._replace(queries=64), "several queries"),
    (("paged",), TOKEN._replace(window=1024), "window 1024"),
    (("paged",), TOKEN._replace(head_dim=64), "head_dim 64"),
    (("paged",), TOKEN._replace(keys=2040), "2040 keys, no multiple of 16"),
    (("paged",), TOKEN._replace(dtype="float32"), "float32"),
    (("paged",), TOKEN._replace(hidden="others"), "a mask of its own"),
    (("few",), DIALOGUE._replace(dtype="float32"), "a sequence that attends to itself"),
    (("few",), TOKEN._replace(queries=17, dtype="float32"), "17 queries"),
    (("few",), TOKEN._replace(dropout=0.1, dtype="float32"), "dropout"),
    (("few",), TOKEN._replace(head_dim=36, dtype="float32"), "head_dim 36"),
    (("few",), TOKEN, "bfloat16"),
]


@pytest.mark.parametrize("names, need, words", REFUSED)
def test_what_is_refused(names, need, words):
    for name in names:
        with pytest.raises(ConfigError) as error:
            Choice(name).take(need)
        assert f"{name!r} has no {words}" in str(error.value)
        able = str(error.value).partition("). ")[2].partition(" can do it")[0].split(" and ")
        assert "dense" in able and name not in able
        assert all(KERNELS[one].refuses(need) is None for one in able)


CHOSEN = [  # what "auto" takes
    ("cpu", PACKED, "dense"),
    ("cpu", PICTURE, "dense"),
    ("tpu", PACKED, "splash"),
    ("tpu", PACKED._replace(window=1024, dtype="float32"), "splash"),
    ("tpu", PICTURE, "splash"),
    ("tpu", PICTURE._replace(dropout=0.1), "dense"),
    ("tpu", PICTURE._replace(queries=64), "splash"),
    ("gpu", DIALOGUE, "cudnn"),
    ("gpu", DIALOGUE._replace(window=1024), "cudnn"),
    ("gpu", PICTURE, "cudnn"),
    ("gpu", PACKED, "triton"),
    ("gpu", PACKED._replace(window=1024), "dense"),
    ("gpu", PACKED._replace(dtype="float32"), "dense"),
    ("gpu", PICTURE._replace(head_dim=256), "triton"),
    ("gpu", PICTURE._replace(dropout=0.1), "dense"),
]


@pytest.mark.parametrize("platform, need, kernel", CHOSEN)
def test_auto_takes_what_the_devices_can_do_best(platform, need, kernel):
    choice = Choice.of("auto", platform)
    assert choice.take(need) is KERNELS[kernel]
    assert f"attention: {kernel} ({need}" in choice.line()
    others = {"cpu": ("splash", "cudnn", "triton"), "gpu": ("splash",), "tpu": ("cudnn", "triton")}
    for other in others[platform]:
        assert f"{other} is for {KERNELS[other].platform}" in choice.line()


@pytest.mark.parametrize("platform, kernel", [("cpu", "dense"), ("gpu", "dense"), ("tpu", "paged")])
def test_what_writes_answers(platform, kernel):
    choice = Choice.of("auto", platform, DECODING)
    assert choice.take(TOKEN) is KERNELS[kernel] and f"attention: {kernel} (1 x 2048" in choice.line()
    assert choice.take(TOKEN._replace(window=1024)) is KERNELS["dense"]
    assert ("paged is for tpu" if platform != "tpu" else "paged has no window 1024") in choice.line()
    beams = TOKEN._replace(queries=3, hidden="others", dtype="float32")
    on_cpu = "few" if loops.compiled() else "loops"
    assert choice.take(beams) is KERNELS[on_cpu if platform == "cpu" else "dense"]
    assert "(3 x 2048, head_dim 128, mask, packed, cache, float32" in choice.line()


def test_a_kernel_for_other_devices_is_refused_at_once():
    with pytest.raises(ConfigError, match="attention=splash is for tpu devices, and these are cpu"):
        Choice.of("splash", "cpu")
    assert Choice.of("dense", "tpu").kernels == ("dense",)


# --- how the choice reaches the kernels


@pytest.fixture
def marks(monkeypatch):
    """Kernels that return their number, and can do all but dropout."""
    for number, name in enumerate(("first", "second")):
        run = lambda q, k, v, spec, dropout, number=number: jnp.full_like(q, number)
        refuses = lambda need: "dropout" if need.dropout else None
        monkeypatch.setitem(KERNELS, name, Kernel(run, refuses))


def test_the_context_reaches_what_is_traced_in_it(marks):
    given, traced = arrays(4, 4), []
    f = jax.jit(lambda *given: (traced.append(1), attend(*given))[1])
    alone = f(*given)
    np.testing.assert_allclose(alone, dense(*given, EVERYTHING, (0.0, None)), atol=1e-6)
    with using("second"):
        assert (f(*given) == 1).all()  # what was compiled outside is not taken
        with using("first"):
            assert (f(*given) == 0).all()
        assert (attend(*given, AttentionSpec(kernel="first")) == 0).all()  # a spec may name its own
        assert (f(*given) == 1).all()
    np.testing.assert_array_equal(f(*given), alone)
    with using("second"):
        assert (f(*given) == 1).all()
    assert len(traced) == 3  # once for each choice


def test_the_first_that_can_is_taken_and_told_in_one_line(marks):
    given, said = arrays(4, 4), []
    choice = Choice("first", "dense", tell=said.append)
    for _ in range(2):  # the second time there is nothing new to tell
        with using(choice):
            assert (attend(*given) == 0).all()
            attend(*given, dropout=(0.5, jax.random.key(0)))
            attend(*given, dropout=(0.5, None))  # without a key nothing is dropped
    (line,) = said
    here = "4 x 4, head_dim 16"
    assert line == (
        f"attention: first ({here}, float32); dense ({here}, dropout 0.5, float32; first has no dropout)"
    )
    with using("first"), pytest.raises(ConfigError, match="'first' has no dropout"):
        attend(*given, dropout=(0.5, jax.random.key(0)))


def test_what_is_needed_is_known_without_values():
    given, said = arrays(6, 6), []
    places = np.ones((2, 6), np.int32), np.tile(np.arange(6, dtype=np.int32), (2, 1))
    later = np.ones((2, 6), np.int32)
    specs = {
        "6 x 6, head_dim 16, causal, packed": AttentionSpec.of(*places),
        "6 x 6, head_dim 16, causal, packed, window 3": AttentionSpec.of(*places, window=3),
        "6 x 6, head_dim 16, blocks, packed": AttentionSpec.of(*places, later=later),
        "6 x 6, head_dim 16, causal, packed, cache": AttentionSpec(Places(*places), Places(*places)),
        "6 x 6, head_dim 16, causal, packed, cache, window 5": AttentionSpec(
            Places(*places), Places(*places), 5
        ),
        "6 x 6, head_dim 16, mask, cache": AttentionSpec(Places(*places), seen=np.ones((2, 6, 6), bool)),
    }
    for said, spec in specs.items():
        choice = Choice("dense")
        with using(choice):
            jax.eval_shape(lambda *given, spec=spec: attend(*given, spec), *given)
        ((need, _),) = choice.taken.items()
        assert str(need) == f"{said}, float32"
    choice = Choice("dense", packed=False)
    with using(choice):
        attend(*given, AttentionSpec.of(*places, window=6))  # a window that hides nothing is none
    ((need, _),) = choice.taken.items()
    assert str(need) == "6 x 6, head_dim 16, causal, float32"
