"""Where compiled programs are kept."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from omnifusion_jax.kept_programs import keep_programs

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def no_place(monkeypatch, tmp_path):
    """JAX as it comes, and the user's cache directory."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()  # which other tests have opened
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_a_program_is_found_in_the_users_cache_though_others_were_compiled_before(no_place):
    jax.jit(lambda x: x * 3)(jnp.ones(3))
    keep_programs()
    jax.jit(lambda x: jnp.sin(x) * 5)(jnp.ones(7))
    assert list((no_place / "omnifusion_jax" / "programs").iterdir())


def test_another_place_stays(no_place):
    jax.config.update("jax_compilation_cache_dir", str(no_place / "mine"))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(no_place / "mine")
