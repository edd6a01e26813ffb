"""Low-rank factors and kernels of integers: what they compute, what is trained, what is written and read."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from settings import changed

from omnifusion_jax.batch import TEXT, Batch
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.mapping.transforms import split_in, split_out
from omnifusion_jax.checkpoints.native import open_native, read_config, save_native
from omnifusion_jax.config import DataConfig, LoraConfig, OptimizerConfig, TrainConfig
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.models import lora
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import abstract, cast
from omnifusion_jax.nn import linear, nnx, quantized
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.run import parted, save_model, starting_point
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import freeze
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.program import build
from omnifusion_jax.training.start import fill
from omnifusion_jax.training.step import batch_sharding, init_state, make_step, state_shardings

RANK, ALPHA = 4, 10.0
FACTORS = r"decoder/.*/lora_[ab]"
TABLE = (
    (rf"(image/adapter|special)/.*|{FACTORS}", 1.0),
    (rf"image/encoders/.*|(?!{FACTORS})decoder/.*", None),
)
UP, OUT = "decoder/layers/feed_forward/up", "decoder/layers/attention/out"
ROWS, LENGTH = 8, 16


def config(base="compute_dtype", **settings):
    c = TrainConfig(
        model=tiny.looking("one encoder"),
        lora=LoraConfig(rank=RANK, alpha=ALPHA, base=base),
        train_parts=TABLE,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0),
        data=DataConfig(path="nowhere", max_length=LENGTH),
        compute_dtype="float32",
        batch_size=ROWS,
    )
    c.model.decoder.layers, c.model.decoder.width, c.model.decoder.mlp = 2, 64, 128
    return changed(c, settings).validate()


def start(c):
    """Random parameters of the model; and of factors, whose second would be zero."""
    rng = np.random.default_rng(1)
    shapes = nnx.parameters(lora.outline(c.model, c.lora))
    drawn = {path: a.shape for path, a in shapes.items() if "/lora_" in path}
    factors = {path: (rng.normal(size=shape) * 0.3).astype(np.float32) for path, shape in drawn.items()}
    return tiny.arrays(c.model) | factors


def batch():
    rng = np.random.default_rng(0)
    tokens, plane = rng.integers(3, tiny.VOCAB, (ROWS, LENGTH), np.int32), np.ones((ROWS, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    media = {"image": (np.zeros((ROWS, 0, 24, 24, 3), np.uint8),)}
    weights = plane.astype(np.float32)
    return Batch(tokens, TEXT * plane, 0 * plane, weights, plane, positions, np.zeros(ROWS, np.int32), media)


def split(c, mesh=None, given=()):
    """(module with shapes, trained, frozen), as a run has them that is given these arrays besides."""
    skeleton, arrays = fill(c, mesh or make_mesh(fsdp=1), start(c) | dict(given))
    trained, frozen = freeze.split(c.train_parts, arrays)
    return skeleton, trained, lora.quantised(frozen, c.lora.base)


def loss_and_gradients(c, remat="none", given=()):
    skeleton, trained, frozen = split(c, given=given)

    def loss(trained):
        module = nnx.with_parameters(skeleton, trained | cast(frozen, jnp.float32))
        value, count = OBJECTIVES["answers"].loss(module, batch(), None, remat)
        return value / count

    return jax.jit(jax.value_and_grad(loss))(trained)


def plain_loss(c, arrays):
    module = nnx.with_parameters(abstract(c.model), arrays)
    value, count = jax.jit(lambda m, b: OBJECTIVES["answers"].loss(m, b, None, "none"))(module, batch())
    return value / count


@pytest.mark.parametrize(("ins", "outs"), [((6,), (10,)), ((6,), (2, 3, 4)), ((2, 3, 4), (6,))])
def test_a_map_with_factors_is_that_of_peft(ins, outs):
    """W x + alpha / rank * B A x, with A [rank, in] and B [out, rank] as PEFT keeps them."""
    torch = pytest.importorskip("torch")
    n, m = math.prod(ins), math.prod(outs)
    weight, a, b = torch.randn(m, n), torch.randn(RANK, n), torch.randn(m, RANK)
    one = Linear(ins, outs, bias=False, rngs=nnx.Rngs(0))
    one.add_factors(RANK, ALPHA, rngs=nnx.Rngs(1))
    assert one.lora_a.shape == (*ins, RANK) and one.lora_b.shape == (RANK, *outs)
    one.kernel = nnx.Param(jnp.asarray(weight.numpy().T.reshape(*ins, *outs)))
    one.lora_a = nnx.Param(jnp.asarray(split_in(*ins).forward(a.numpy())))
    one.lora_b = nnx.Param(jnp.asarray(split_out(*outs).forward(b.numpy())))
    x = torch.randn(5, n)
    expected = x @ weight.T + ALPHA / RANK * (x @ a.T) @ b.T
    found = one(x.numpy().reshape(5, *ins)).reshape(5, m)
    assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def test_dropout_falls_where_peft_has_it():
    """On what enters the factors, and the kernel sees all; what is left is scaled, so that the mean stays."""
    linear, one = Linear(4, 4, bias=False, rngs=nnx.Rngs(0)), nnx.Param(jnp.eye(4))
    linear.add_factors(4, 8.0, 0.3, rngs=nnx.Rngs(1))
    linear.kernel, linear.lora_a, linear.lora_b = nnx.Param(10 * jnp.eye(4)), one, one
    x = jnp.ones((20_000, 4))
    assert_array_equal(linear(x), 12 * x)
    linear.lora_key = nnx.Param(jax.random.key(0))
    y = np.asarray(linear(x)) - 10
    dropped = np.abs(y) < 1e-6
    assert abs(dropped.mean() - 0.3) < 0.01
    assert_allclose(y[~dropped], 2 / 0.7, rtol=1e-5)
    assert_allclose(y.mean(axis=0), 2, rtol=0.02)


def test_each_map_and_layer_has_a_key_of_its_own():
    """None of them is one that the adapter makes of the same key; without dropout there are none."""
    key, found = jax.random.key(3), {}
    for rate in (0.5, 0.0):
        c = config(**{"lora.dropout": rate})
        module = nnx.with_parameters(*fill(c, make_mesh(fsdp=1), start(c)))
        lora.set_dropping(module, key)
        owners = [nnx.owner(module, path) for path in lora.targets(c.lora, nnx.parameters(module))]
        found[rate] = [owner.lora_key for owner in owners]
    assert found[0.0] == [None] * 7
    keys = [own[...] for own in found[0.5]] + [jax.random.split(key, 8), key[None]]
    drawn = np.concatenate([jax.random.key_data(own) for own in keys])
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 7 * 2 + 9


def test_nothing_is_dropped_but_in_training():
    """The loss and its gradients as evaluation computes them, to the bit."""
    value, gradients = loss_and_gradients(config())
    other, others = loss_and_gradients(config(**{"lora.dropout": 0.5}))
    assert_array_equal(other, value)
    for path, a in gradients.items():
        assert_array_equal(others[path], a, err_msg=path)


def test_fresh_factors_change_nothing_and_are_drawn_as_peft_draws_them():
    c = config()
    arrays = fill(c, make_mesh(fsdp=1), tiny.arrays(c.model))[1]
    assert not any(a.any() for path, a in arrays.items() if path.endswith("lora_b"))
    first = np.asarray(arrays[f"{OUT}/lora_a"])  # kaiming_uniform_ with a = sqrt(5): U(-1, 1) / sqrt(inputs)
    bound = math.prod(first.shape[1:-1]) ** -0.5
    assert first.shape == (2, 2, 3, 16, RANK) and 0.95 * bound < np.abs(first).max() <= bound
    assert abs(first.std() - bound / 3**0.5) < 0.1 * bound
    assert np.abs(first[0] - first[1]).max() > 0.1 * bound


def test_the_merged_model_computes_the_same():
    c = config()
    value, _ = loss_and_gradients(c)
    arrays = start(c)
    merged = lora.merged(arrays, c.lora, jnp.float32)
    assert set(merged) == set(nnx.parameters(abstract(c.model)))
    w, a, b = (arrays[f"{OUT}/{name}"].astype(np.float64) for name in ("kernel", "lora_a", "lora_b"))
    expected = w + ALPHA / RANK * np.einsum("lkghr,lrd->lkghd", a, b)
    assert_allclose(merged[f"{OUT}/kernel"], expected, rtol=0, atol=1e-5)
    assert_allclose(value, plain_loss(c, merged), rtol=1e-5)
    assert abs(value - plain_loss(c, {path: arrays[path] for path in merged})) > 1e-3


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_are_within_half_a_step_of_the_kernel(kind):
    most = {"int8": 127, "int4": 7}[kind]
    kernel = np.random.default_rng(0).normal(size=(128, 3, 5)).astype(np.float32)
    kernel[64:] *= 100  # blocks of 64 inputs have scales of their own
    codes, scales = quantized.quantise(kernel, quantized.scales_shape(kernel.shape, 0), kind)
    assert codes.nbytes == kernel.size * {"int8": 1, "int4": 0.5}[kind] and scales.shape == (2, 3, 5)
    blocks = kernel.reshape(2, 64, 3, 5)
    step = np.abs(blocks).max(axis=1, keepdims=True) / most
    error = np.abs(np.asarray(quantized.values(codes, scales)).reshape(blocks.shape) - blocks)
    assert (error <= 0.5 * step * 1.01 + most * step * 2**-8).all()
    assert error.max() > 0.3 * step.max()


def test_blocks_lie_along_the_last_dimension_of_the_inputs():
    assert quantized.scales_shape((2, 128, 3, 1, 5), 1) == (2, 2, 3, 1, 5)
    assert quantized.scales_shape((2, 3, 1, 128, 5), 3) == (2, 3, 1, 2, 5)
    assert quantized.scales_shape((2, 100, 5), 1) == (2, 1, 5)  # no multiple of a block: one scale a column


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_step_over_integers_is_that_over_their_values(kind):
    """The loss and every gradient, with and without what the backward pass makes again."""
    c = config(kind)
    _, _, frozen = split(c)
    kernels = [path for path in frozen if path.startswith("decoder/layers/") and path.endswith("/kernel")]
    assert len(kernels) == 7 and all(frozen[path].dtype.itemsize == 1 for path in kernels)
    values = lora.merged(frozen, c.lora, jnp.float32)
    value, gradients = loss_and_gradients(config(), given=values)
    for theirs, ours in (loss_and_gradients(c), loss_and_gradients(c, "full")):
        assert_allclose(theirs, value, rtol=1e-5)
        for path, a in gradients.items():
            assert_allclose(ours[path], a, rtol=0, atol=5e-4 * np.abs(a).max() + 1e-7, err_msg=path)


def test_values_of_integers_are_not_kept_for_the_backward_pass():
    kernel = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    codes, scales = quantized.quantise(kernel, (1, 32), "int8")
    _, back = jax.vjp(lambda x: quantized.product(x, codes, scales, 1), jnp.ones((3, 64)))
    kept = [a for a in jax.tree.leaves(back) if a.shape == kernel.shape]
    assert all(a.dtype == jnp.int8 for a in kept)
    expected = np.ones((3, 32)) @ np.asarray(quantized.values(codes, scales)).T
    assert_allclose(back(jnp.ones((3, 32)))[0], expected, rtol=1e-5)


def step_of(c, mesh, grad_accum=1, optimizer=None):
    """(losses, trained, frozen) of two steps on a mesh."""
    skeleton, trained, frozen = split(c, mesh)
    optimizer = optimizer or make_optimizer(c.optimizer, c.steps, c.train_parts)
    settings = {"seed": 0, "grad_accum": grad_accum, "dtype": jnp.dtype(c.compute_dtype), "remat": "full"}
    step = make_step(skeleton, OBJECTIVES["answers"], optimizer, **settings)
    state = init_state(optimizer, cast(trained, jnp.float32))
    placed = state_shardings(mesh, jax.eval_shape(lambda: state))
    state = jax.device_put(state, placed)
    frozen, losses = cast(frozen, c.compute_dtype), []
    with jax.set_mesh(mesh):
        run = jax.jit(step, out_shardings=(placed, None))
        for _ in range(2):
            state, metrics = run(state, frozen, batch())
            losses.append(float(metrics["loss"]))
    return losses, state, frozen


def test_every_mesh_trains_factors_alike():
    c = config("int8")
    alone, state, _ = step_of(c, make_mesh(fsdp=1))
    losses, spread, frozen = step_of(c, make_mesh(fsdp=4, tensor=2))
    assert_allclose(losses, alone, rtol=1e-5)
    for path, a in state.params.items():
        assert_allclose(spread.params[path], a, rtol=0, atol=2e-5, err_msg=path)
    assert spread.params[f"{UP}/lora_b"].sharding.shard_shape((2, RANK, 128)) == (2, RANK // 4, 64)
    for path in (f"{UP}/kernel", f"{UP}/kernel_scale"):
        assert frozen[path].sharding == placements(make_mesh(fsdp=4, tensor=2), frozen)[path], path
    before = start(c)
    for path, a in state.params.items():
        assert np.abs(a - before[path]).max() > 1e-4 or not path.startswith("decoder/"), path


def test_a_step_drops_what_its_number_says_on_every_mesh():
    """Its key follows from seed 0, step 0 and the first micro-batch."""
    c, mesh = config(**{"lora.dropout": 0.3}), make_mesh(fsdp=4, tensor=2)
    (first, _), *_ = step_of(c, make_mesh(fsdp=1))
    [key] = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 1)
    skeleton, trained, frozen = split(c, mesh)

    def loss(arrays, batch):
        module = nnx.with_parameters(skeleton, arrays)
        lora.set_dropping(module, key)
        value, count = OBJECTIVES["answers"].loss(module, batch, key, "none")
        return value / count

    with jax.set_mesh(mesh):
        spread = jax.jit(loss)(trained | frozen, jax.device_put(batch(), batch_sharding(mesh)))
    assert_allclose(spread, first, rtol=1e-5)
    assert abs(first - loss_and_gradients(c)[0]) > 1e-3


def test_gradients_of_factors_add_up_in_float32(monkeypatch):
    c, factors, real = config("int4", compute_dtype="bfloat16"), set(), linear.product

    def product(x, kernel, *given):
        if RANK in (kernel.shape[0], kernel.shape[-1]):
            factors.add((x.dtype.name, kernel.dtype.name))
        return real(x, kernel, *given)

    monkeypatch.setattr(linear, "product", product)
    _, state, frozen = step_of(c, make_mesh(fsdp=1), grad_accum=4, optimizer=tiny.RECORDER)
    assert factors == {("bfloat16", "float32")}  # a product of these has a gradient that is never rounded
    assert (
        {a.dtype for a in state.params.values()}
        == {a.dtype for a in state.optimizer.values()}
        == {jnp.dtype("float32")}
    )
    assert frozen[f"{UP}/kernel"].nbytes == 2 * 64 * 128 / 2 and frozen["decoder/embed"].dtype == jnp.bfloat16
    _, whole, _ = step_of(c, make_mesh(fsdp=1), optimizer=tiny.RECORDER)
    for path, a in whole.optimizer.items():
        assert_allclose(state.optimizer[path], a, rtol=0, atol=0.05 * np.abs(a).max() + 1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora.targets": "nothing"}, "no parameter matches 'nothing'"),
        ({"lora.targets": "decoder/(embed|layers/.*/kernel)"}, "decoder/embed, which is no kernel"),
        ({"lora.targets": "(image/encoders/0|decoder)/layers/.*/kernel"}, "which is no kernel"),
        (
            {"train_parts": ((r"(image/adapter|special|decoder)/.*", 1.0), (r"image/encoders/.*", None))},
            "trains decoder/layers/attention/key/kernel, .* itself",
        ),
        (
            {
                "lora.rank": 0,
                "lora.base": "int8",
                "train_parts": ((r"(image/adapter|special|decoder)/.*", 1.0), (r"image/encoders/.*", None)),
            },
            "no kernel of a decoder is frozen",
        ),
    ],
)
def test_what_cannot_have_factors_is_refused(settings, message):
    c = config(**settings)
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda: build(c, rngs=nnx.Rngs(0)))


# --- what is written and read


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer")).directory


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A whole model, which the decoder of a run comes from."""
    folder, c = tmp_path_factory.mktemp("base") / "model", config()
    save_native(folder, c.model, tiny.arrays(c.model), tokenizer)
    return folder


@functools.cache
def left_by_a_run(kind):
    c = config(kind)
    _, trained, frozen = split(c)
    return c, trained, frozen


def write(folder, c, trained, frozen, tokenizer):
    folder.mkdir(exist_ok=True)
    save_model(c, folder / "model", trained, frozen, tokenizer)
    return folder / "model"


def test_factors_are_saved_alone(tokenizer, tmp_path):
    c, trained, frozen = left_by_a_run("int4")
    folder = write(tmp_path, c, trained, frozen, tokenizer)
    assert read_config(folder)[1] == ["image/adapter", "lora", "special"]
    _, arrays = open_native(folder)
    assert set(arrays) == set(trained)
    for path, a in arrays.items():
        assert_array_equal(np.asarray(a), trained[path])
    assert load_checkpoint(folder).missing == ("image/encoders/0", "decoder")


@pytest.mark.parametrize("kind", ["compute_dtype", "int4"])
def test_with_their_base_they_are_the_whole_model(kind, base, tokenizer, tmp_path):
    """That which a run with checkpoint.final=complete writes: values of integers, and factors merged."""
    c, trained, frozen = left_by_a_run(kind)
    alone = write(tmp_path / "alone", c, trained, frozen, tokenizer)
    whole = write(
        tmp_path / "whole", changed(c, {"checkpoint.final": "complete"}), trained, frozen, tokenizer
    )
    joined, complete = load_checkpoint(alone, base=base), load_checkpoint(whole)
    assert joined.missing == complete.missing == () and joined.factors is None
    assert set(joined.arrays) == set(complete.arrays)
    for path, a in complete.arrays.items():
        assert_allclose(np.asarray(joined.arrays[path]), np.asarray(a), rtol=0, atol=2e-6, err_msg=path)
    piece = joined.arrays[f"{OUT}/kernel"][1:, :, 1:2, 3:9, 5:]
    assert_array_equal(piece, np.asarray(joined.arrays[f"{OUT}/kernel"])[1:, :, 1:2, 3:9, 5:])
    spread = load_checkpoint(alone, base=base, mesh=make_mesh(fsdp=4, tensor=2))
    assert_allclose(spread.arrays[f"{UP}/kernel"], np.asarray(joined.arrays[f"{UP}/kernel"]), atol=1e-6)


def test_a_base_of_other_settings_is_refused(tokenizer, tmp_path):
    c, trained, frozen = left_by_a_run("compute_dtype")
    alone = write(tmp_path, c, trained, frozen, tokenizer)
    other = changed(c.model, {"decoder.rope_theta": 500.0})
    save_native(tmp_path / "other", other, tiny.arrays(other), tokenizer)
    with pytest.raises(ConfigError, match=r"model\.decoder.*rope_theta=500"):
        load_checkpoint(alone, base=tmp_path / "other")


def test_a_run_goes_on_from_factors(base, tokenizer, tmp_path):
    c, trained, frozen = left_by_a_run("compute_dtype")
    alone = write(tmp_path, c, trained, frozen, tokenizer)
    parts = {"decoder": str(base), "image/encoders/0": str(base)}
    c = changed(c, {"init_from": str(alone), "parts_from": parts})
    arrays, _ = starting_point(c)
    assert_array_equal(arrays[f"{UP}/lora_b"], trained[f"{UP}/lora_b"])
    _, filled = fill(c, make_mesh(fsdp=1), parted(c, arrays, None)[0])
    assert_array_equal(filled[f"{UP}/lora_b"], trained[f"{UP}/lora_b"])
    for settings in ({"lora.rank": 8}, {"lora.rank": 0}, {"lora.alpha": 1.0}):
        with pytest.raises(ConfigError, match=r"other settings than the config's lora\. .*--config\.lora\."):
            starting_point(changed(c, settings))


def test_damaged_factors_are_named(tokenizer, tmp_path):
    c, trained, _ = left_by_a_run("compute_dtype")
    with pytest.raises(CheckpointError, match=r"lora_a: missing"):
        lacking = {path: a for path, a in trained.items() if path != f"{UP}/lora_a"}
        save_native(tmp_path / "model", c.model, lacking, tokenizer, c.lora)
