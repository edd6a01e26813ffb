"""What has to be set before JAX starts.

Eight simulated CPU devices, one thread a process where it matters, and no accelerator.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import re
import resource
import sys
from pathlib import Path

import hypothesis
import pytest
from processes import run_module

ROOT = Path(__file__).parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs run a few times here: three quarters of the time it takes to compile them make them fast.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib") < "0.11":  # a flag that XLA does not know ends the process
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # a tenth of the time to lower a program
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST_COMPILATION}"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # workers may compile for TPUs at the same time
os.environ["HF_HUB_OFFLINE"] = "1"
# What one worker or command compiled, the others load; so does the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

hypothesis.settings.register_profile("at any speed", deadline=None)
hypothesis.settings.load_profile("at any speed")

# PyTorch is the oracle of files that import it, or helpers that do; `make test` installs it
NEEDS_TORCH = re.compile(r"^(import|from) (torch|models|oracle|parity|llava_models)\b", re.MULTILINE)
collect_ignore = []
if importlib.util.find_spec("torch") is None:
    collect_ignore = [
        str(file.relative_to(Path(__file__).parent))
        for file in sorted(Path(__file__).parent.rglob("test_*.py"))
        if NEEDS_TORCH.search(file.read_text(encoding="utf-8"))
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The small tokenizer of most tests."""
    import tiny  # only now: it imports JAX

    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    """Programs of a module go with it: together they would take gigabytes.

    What remains is left out of later collections, which took a seventh of the time.
    """
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # the libraries that tests import


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


peaks = []


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    peaks.append(getattr(node, "workeroutput", {}).get("peak", 0))


def pytest_terminal_summary(terminalreporter):
    if peaks:
        terminalreporter.write_line(
            "largest memory of each worker: " + ", ".join(f"{peak / 2**20:.2f} GiB" for peak in peaks)
        )
    if collect_ignore:
        names = ", ".join(collect_ignore)
        terminalreporter.write_line(
            f"NOT RUN, since PyTorch is not installed: {len(collect_ignore)} files, {names}", yellow=True
        )


def run_command(name, *arguments, fails=False, given=""):
    """Runs `python -m omnifusion_jax.NAME` on one device from the repository's root.

    Returns what it printed, stderr included.
    """
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)}
    status, said = run_module(f"omnifusion_jax.{name}", arguments, ROOT, environment, given)
    assert (status != 0) == fails, said[-4000:]
    return said
