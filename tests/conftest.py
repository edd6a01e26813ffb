"""Set before JAX starts: eight simulated CPU devices, one thread a process where it matters, and no accelerator."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]

# PyTorch is the oracle of these; `make test` installs it
collect_ignore = []
if importlib.util.find_spec("torch") is None:
    names = (
        "parity/test_forward",
        "parity/test_generate",
        "checkpoints/test_original",
        "checkpoints/test_engine",
        "checkpoints/test_two_encoders",
        "checkpoints/test_vision",
        "checkpoints/test_llava",
        "checkpoints/test_llava_export",
        "parity/test_encoders",
        "parity/test_adapters",
        "inference/test_logits",
    )
    collect_ignore = [f"{name}.py" for name in names]


def pytest_report_header():
    return f"without PyTorch, which is not installed: {', '.join(collect_ignore)}" if collect_ignore else "with PyTorch"


def run_command(name, *arguments, fails=False, given=""):
    """Runs `python -m omnifusion_jax.NAME` on one device from the repository's root; returns what it printed, stderr included."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"omnifusion_jax.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, input=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout
