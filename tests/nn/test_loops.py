"""Loops in C++ for a few rows, beside the same in NumPy and as XLA has it."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnifusion_jax.config import DecoderConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.decoder import Decoder
from omnifusion_jax.nn import loops, nnx
from omnifusion_jax.nn.attend import AttentionSpec, attend, using
from omnifusion_jax.nn.choice import DECODING, Choice, Need
from omnifusion_jax.nn.linear import product, product_turned
from omnifusion_jax.tables import KERNELS

able = pytest.mark.skipif(loops.compiled() is not None, reason=f"there are no {loops.compiled()}")
ALLOWED = Choice("loops", "dense")
NEED = Need("float32", 64, 1, 100, "others", False, None, 0.0, True)  # of attention to a cache


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def program(f, *arguments):
    """What f gives where loops are allowed, and the names of all that its program calls."""
    with using(ALLOWED):
        lowered = jax.jit(f).lower(*arguments)
    return lowered.compile()(*arguments), lowered.as_text()


@able
@pytest.mark.parametrize("rows", [*range(1, 10), 15, 16])
@pytest.mark.parametrize(
    "ins, outs",
    [(512, 128), (100, 700), (33, 2003), (2048, 33), (31, 2500), (70_000, 1), (3, 22_001), (9, 8193)],
)
def test_a_product_is_that_of_matrices(rows, ins, outs):
    x, kernel = draw(0, rows, ins), draw(1, ins, outs)
    y, text = program(product, x, kernel)
    assert "omnifusion_product" in text
    exact = np.float64(x) @ np.float64(kernel)
    np.testing.assert_allclose(y, exact, atol=3e-7 * ins)


@able
@pytest.mark.parametrize("rows", [*range(1, 10), 15, 16])
@pytest.mark.parametrize("ins, outs", [(512, 160), (100, 703), (1037, 65), (3, 22_000)])
def test_a_product_with_a_turned_kernel_is_that_of_matrices(rows, ins, outs):
    x, kernel = draw(0, rows, ins), draw(1, outs, ins)
    y, text = program(product_turned, x, kernel)
    assert "omnifusion_product_turned" in text
    np.testing.assert_allclose(y, np.float64(x) @ np.float64(kernel).T, atol=3e-7 * ins)


@able
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_not_copied_for_each_token(tied):
    c = DecoderConfig(vocab=1030, width=64, layers=1, heads=2, kv_heads=1, head_dim=32, mlp=64, tied=tied)
    decoder = Decoder(c, rngs=nnx.Rngs(0))
    x = draw(0, 2, 3, 64)
    found, text = program(lambda decoder, x: decoder.logits(x), decoder, x)
    assert "omnifusion_product" in text and "transpose" not in text
    np.testing.assert_allclose(found, decoder.logits(x), atol=1e-5)
    assert decoder.logits(x.astype("bfloat16")).dtype == "float32"


@able
def test_dimensions_of_a_kernel_stay_apart():
    x, kernel = draw(0, 2, 3, 4, 128), draw(1, 4, 128, 8, 5, 6)
    y, text = program(lambda x, kernel: product(x, kernel, 2), x, kernel)
    assert "omnifusion_product" in text
    np.testing.assert_allclose(y, np.einsum("abij,ijklm->abklm", x, kernel), atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "rows, dtypes, kernel",
    [
        (17, "float32 float32 float32", (512, 128)),
        (0, "float32 float32 float32", (512, 128)),
        (1, "float32 float32 float32", (511, 128)),
        (1, "bfloat16 float32 float32", (512, 128)),
        (1, "float32 bfloat16 float32", (512, 128)),
        (1, "float32 float32 bfloat16", (512, 128)),
    ],
)
def test_other_products_are_left_to_xla(rows, dtypes, kernel, turned):
    of_x, of_kernel, of_y = dtypes.split()
    x, kernel = draw(0, rows, kernel[0]).astype(of_x), draw(1, *kernel).astype(of_kernel)
    multiply, kernel = (product_turned, kernel.T) if turned else (product, kernel)
    y, text = program(lambda x, kernel: multiply(x, kernel, dtype=jnp.dtype(of_y)), x, kernel)
    assert "omnifusion" not in text
    assert y.dtype == of_y


def test_products_are_left_to_xla_where_loops_are_not_allowed():
    assert "omnifusion" not in jax.jit(product).lower(draw(0, 1, 512), draw(1, 512, 128)).as_text()


def test_on_several_devices_all_is_left_to_xla():
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert loops.missing() == KERNELS["loops"].refuses(NEED) == "loops for several devices"
        _, text = program(product, draw(0, 1, 512), draw(1, 512, 128))
    assert "omnifusion" not in text


@able
def test_not_a_number_stays_none():
    x, kernel = draw(0, 3, 512), draw(1, 512, 130)
    y, _ = program(product, x.at[1, 5].set(jnp.nan), kernel.at[7, 129].set(jnp.inf))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[::2, :129]).all()
    assert np.isinf(y[::2, 129]).all()


@able
def test_a_product_of_many_is_that_of_each():
    x, kernel = draw(0, 5, 2, 512), draw(1, 512, 128)
    y, _ = program(jax.vmap(lambda x: product(x, kernel)), x)
    np.testing.assert_allclose(y, x @ kernel, atol=1e-4)


def exactly(q, k, v, seen):
    """Attention in 64 bits; a query that sees nothing gives zeros."""
    q, k, v = map(np.float64, (q, k, v))
    scores = np.einsum("bkgqd,bksd->bkgqs", q, k) / q.shape[-1] ** 0.5
    scores = np.where(np.asarray(seen)[:, None, None], scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgqs,bksd->bkgqd", np.nan_to_num(weights), v)


def attended(q, k, v, seen):
    y, text = program(lambda *a: attend(*a[:3], AttentionSpec(seen=a[3])), q, k, v, seen)
    assert "omnifusion_attention" in text
    return y


@able
@pytest.mark.parametrize(
    "batch, heads, group, queries, length, size",
    [
        (1, 1, 1, 1, 1, 16),
        (2, 3, 1, 1, 70, 64),
        (3, 2, 4, 1, 129, 48),
        (2, 2, 1, 3, 200, 80),
        (2, 2, 3, 2, 64, 128),
        (1, 2, 2, 8, 33, 256),
        (2, 1, 1, 16, 90, 112),
    ],
)
def test_attention_is_that_of_64_bits(batch, heads, group, queries, length, size):
    q, k, v = draw(0, batch, heads, group, queries, size), *draw(1, 2, batch, heads, length, size)
    seen = (
        jax.random.bernoulli(jax.random.key(2), 0.6, (batch, queries, length)).at[:, :, length // 2].set(True)
    )
    np.testing.assert_allclose(attended(3 * q, k, v, seen), exactly(3 * q, k, v, seen), atol=2e-6)


@able
def test_a_query_may_see_far_more_than_the_first():
    """Past the 64 keys that all queries meet together, some have none left."""
    q, k, v = draw(0, 1, 2, 2, 3, 16), *draw(1, 2, 1, 2, 150, 16)
    seen = jnp.arange(150) < jnp.array([[[5], [150], [70]]])
    np.testing.assert_allclose(attended(q, k, v, seen), exactly(q, k, v, seen), atol=2e-6)


@able
def test_nothing_is_returned_before_the_last_thread_is_done():
    """One row of two takes far longer. Weights of values that are one add up to one."""
    q, k = draw(0, 2, 1, 64, 16, 16), draw(1, 2, 1, 2000, 16)
    seen = jnp.broadcast_to(jnp.arange(2000) < jnp.array([[[100]], [[2000]]]), (2, 16, 2000))
    with using(ALLOWED):
        attended = jax.jit(loops.attention).lower(q, k, jnp.ones_like(k), seen).compile()
    for _ in range(5):
        y = np.array(attended(q, k, jnp.ones_like(k), seen))  # at once: a late thread would still mend it
        np.testing.assert_allclose(y, 1.0, rtol=1e-4)


@able
@pytest.mark.parametrize(
    "name, shapes, result",
    [
        ("product", [(17, 4), (4, 5)], (17, 5)),
        ("product", [(2, 4), (3, 5)], (2, 5)),
        ("product", [(2, 4), (4, 5)], (2, 6)),
        ("product", [(2, 0), (0, 5)], (2, 5)),
        ("product_turned", [(17, 4), (5, 4)], (17, 5)),
        ("product_turned", [(2, 4), (5, 3)], (2, 5)),
        ("product_turned", [(2, 4), (5, 4)], (2, 6)),
        ("attention", [(4, 6, 16), (4, 9, 16), (4, 9, 16), (3, 2, 9)], (4, 6, 16)),  # batch
        ("attention", [(4, 6, 16), (4, 9, 16), (4, 9, 16), (0, 2, 9)], (4, 6, 16)),
        ("attention", [(4, 6, 16), (4, 9, 16), (4, 9, 16), (2, 4, 9)], (4, 6, 16)),  # queries
        ("attention", [(4, 6, 16), (4, 9, 16), (4, 9, 16), (2, 0, 9)], (4, 6, 16)),
        ("attention", [(4, 6, 20), (4, 9, 20), (4, 9, 20), (2, 2, 9)], (4, 6, 20)),  # size
        ("attention", [(4, 6, 16), (4, 9, 32), (4, 9, 32), (2, 2, 9)], (4, 6, 16)),
        ("attention", [(4, 6, 16), (2, 9, 16), (2, 9, 16), (2, 2, 9)], (4, 6, 16)),  # heads
        ("attention", [(4, 6, 16), (4, 9, 16), (4, 9, 16), (2, 2, 8)], (4, 6, 16)),  # length
        ("attention", [(4, 6, 16), (4, 9, 16), (4, 8, 16), (2, 2, 9)], (4, 6, 16)),
        ("attention", [(4, 6, 16), (4, 9, 16), (4, 9, 16), (2, 2, 9)], (4, 3, 16)),  # the result
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shapes, result):
    call = jax.ffi.ffi_call(f"omnifusion_{name}", jax.ShapeDtypeStruct(result, jnp.float32))
    arrays = [jnp.ones(shape, bool if n == 3 else "float32") for n, shape in enumerate(shapes)]
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"{name.removesuffix('_turned')}: shapes that do not fit"
    ):
        jax.block_until_ready(call(*arrays))


@able
def test_what_no_query_sees_may_be_anything():
    q, k, v = draw(0, 1, 2, 1, 1, 32), *draw(1, 2, 1, 2, 40, 32)
    seen = jnp.arange(40)[None, None] % 3 > 0
    spoiled = [jnp.where(seen[0, 0][:, None], a, jnp.nan) for a in (k, v)]
    np.testing.assert_array_equal(attended(q, *spoiled, seen), attended(q, k, v, seen))
    np.testing.assert_array_equal(attended(q, k, v, jnp.zeros_like(seen)), jnp.zeros_like(q))


@able
def test_scores_may_lie_far_apart():
    """Weights below 1e-37 count for nothing, and one that is all there is for all."""
    size, length = 16, 50
    k = jnp.zeros((1, 1, length, size)).at[0, 0, :, 0].set(jnp.linspace(-4000, 4000, length))
    q, v = jnp.ones((1, 1, 1, 1, size)), draw(0, 1, 1, length, size)
    seen = jnp.ones((1, 1, length), bool)
    np.testing.assert_allclose(attended(q, k, v, seen)[0, 0, 0, 0], v[0, 0, -1], rtol=1e-6)
    np.testing.assert_allclose(attended(-q, k, v, seen)[0, 0, 0, 0], v[0, 0, 0], rtol=1e-6)
    assert np.isnan(attended(q.at[...].set(jnp.nan), k, v, seen)).all()


@able
def test_weights_are_exact_from_one_down_to_nothing():
    """Two keys each: the weight of the second is the sigmoid of the distance of their scores."""
    distances = np.linspace(-86, 0, 4001, dtype=np.float32)
    k = jnp.zeros((len(distances), 1, 2, 16)).at[:, 0, 1, 0].set(4 * distances)
    v = jnp.zeros_like(k).at[:, 0, 1].set(1.0)
    y = attended(jnp.ones((len(distances), 1, 1, 1, 16)), k, v, jnp.ones((len(distances), 1, 2), bool))
    exact = 1 / (1 + np.exp(-np.float64(distances)))
    np.testing.assert_allclose(y[:, 0, 0, 0, 0], exact, rtol=5e-7)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"cache": False}, "a sequence that attends to itself"),
        ({"hidden": "nothing"}, "queries that see everything"),
        ({"queries": 17}, "17 queries"),
        ({"head_dim": 24}, "head_dim 24"),
        ({"dropout": 0.1}, "dropout"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_attention_that_is_refused(changed, reason):
    assert KERNELS["loops"].refuses(NEED._replace(**changed)) == reason
    assert KERNELS["loops"].refuses(NEED) == loops.compiled()


def test_where_answers_are_written_loops_come_first_on_a_cpu():
    assert Choice.of("auto", "cpu", DECODING).kernels == ("loops", "few", "dense")
    assert "loops" not in Choice.of("auto", "tpu", DECODING).kernels
    with pytest.raises(ConfigError, match="for cpu devices"):
        Choice.of("loops", "gpu")


ASK = """
    import json, sys
    from omnifusion_jax.nn import loops
    from omnifusion_jax.nn.attend import using
    from omnifusion_jax.nn.choice import Choice
    from omnifusion_jax.nn.linear import product
    import jax, jax.numpy as jnp
    with using(Choice("loops", "dense")):
        y = jax.jit(product)(jnp.ones((1, 512)), jnp.ones((512, 128)))
    print(json.dumps([loops.compiled(), float(y.sum())]))
"""


def ask(home, **environment):
    """(why there are no loops, what is said of that) in a process with that cache directory."""
    environment = os.environ | {"XDG_CACHE_HOME": str(home)} | environment
    words = [sys.executable, "-c", textwrap.dedent(ASK)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=True)
    why, total = json.loads(done.stdout)
    assert total == 512 * 128
    return why, done.stderr


@able
def test_they_are_compiled_once(tmp_path):
    assert ask(tmp_path)[0] is None
    (library,) = (tmp_path / "omnifusion_jax" / "loops").iterdir()
    before = library.stat().st_mtime_ns
    assert ask(tmp_path)[0] is None
    assert [library] == list(library.parent.iterdir())
    assert library.stat().st_mtime_ns == before


@able
def test_the_loops_of_a_smaller_processor_agree(tmp_path):
    """AVX2: registers half as wide, and half as many."""
    flags = [f if f != "-march=native" else "-march=haswell" for f in loops.FLAGS]
    script = f"""
        from omnifusion_jax.nn import loops
        loops.FLAGS = tuple({flags})
        import pytest, sys
        words = "-q -p no:cacheprovider -n 0 -k".split()
        sys.exit(pytest.main([*words, "matrices or 64_bits or weights", {__file__!r}]))
    """
    # new memory is full of numbers, so that sums which do not begin with nothing are seen
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "MALLOC_PERTURB_": "64"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (library,) = (tmp_path / "omnifusion_jax" / "loops").iterdir()
    assert library != loops.build(library.parent)  # each processor has its own


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Makes CXX lines of a shell that gets a compiler's flags, to compile a file of one line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loops, "SOURCE", tmp_path / "one.cc")
    loops.SOURCE.write_text("int one;")
    script = tmp_path / "compiler"

    def becomes(*lines):
        script.write_text("\n".join(("#!/bin/sh", *lines)))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return becomes


@able
def test_each_processor_has_its_own(shell, tmp_path):
    """Many machines may have a user's directory; what each can do is in what its compiler defines."""
    shell('exec c++ "$@"')
    one = loops.build(tmp_path)
    shell('exec c++ "$@" -mno-avx2')
    assert loops.build(tmp_path) != one


@able
def test_what_is_half_written_is_never_seen(shell, tmp_path):
    shell('c++ "$@"', 'case "$*" in *" -o "*) exit 1; esac')
    with pytest.raises(subprocess.CalledProcessError):
        loops.build(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


@able
def test_two_threads_compile_once(shell, tmp_path, monkeypatch):
    """XLA takes a function of one address for a name, and each library has its own."""
    shell(f'case "$*" in *" -o "*) echo >> {tmp_path}/times; sleep 0.3; esac', 'exec c++ "$@"')
    monkeypatch.setattr(loops, "HANDLERS", {})
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: loops.compiled.__wrapped__(), range(2))) == [None, None]
    assert (tmp_path / "times").read_text() == "\n"


@pytest.mark.parametrize(
    "lines, said",
    [
        (["echo what is that >&2", "exit 1"], "what is that"),
        (["printf '\\351t\\351' >&2", "exit 1"], "\ufffdt\ufffd"),  # as in Latin-1
        (["echo a warning >&2", "exec sleep 60"], "timed out"),
    ],
)
def test_whatever_a_compiler_does_is_said(shell, monkeypatch, caplog, lines, said):
    shell(*lines)
    monkeypatch.setattr(loops, "PATIENCE", 1)
    assert loops.compiled.__wrapped__() == "compiled one.cc"
    assert said in caplog.text


@pytest.mark.parametrize(
    "name, value, said",
    [("CXX", "c++ '", "No closing quotation"), ("XDG_CACHE_HOME", "~nobody-of-that-name/", "home directory")],
)
def test_an_environment_that_makes_no_sense_is_said(shell, monkeypatch, caplog, name, value, said):
    shell('exec c++ "$@"')
    monkeypatch.setenv(name, value)
    assert loops.compiled.__wrapped__() == "compiled one.cc"
    assert said in caplog.text


@pytest.mark.parametrize("compiler", ["there-is-no-such-compiler", "cat"])
def test_without_a_compiler_it_is_said_once_and_xla_multiplies(tmp_path, compiler):
    why, said = ask(tmp_path, CXX=compiler)
    assert why == "compiled loops.cc"
    assert said.count("slower on this CPU") == 1


def test_no_compiler_may_be_asked_for(tmp_path):
    why, said = ask(tmp_path, CXX="false")
    assert why == "compiled loops.cc"
    assert "slower" not in said


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "omnifusion_jax").write_text("a file in the place of a folder")
    why, said = ask(tmp_path)
    assert why == "compiled loops.cc"
    assert "slower on this CPU" in said
