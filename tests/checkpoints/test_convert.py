"""The converter's command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        check=False,
    )


def test_the_command_line(source, tmp_path):
    done = run(
        "-m",
        "omnifusion_jax.convert",
        f"--source={source}",
        f"--output={tmp_path / 'native'}",
        "--dtype=float32",
    )
    assert done.returncode == 0, done.stderr
    assert "omnifusion, omnifusion-custom" in done.stdout and "bytes" in done.stdout
    size = sum(a.size for a in load_checkpoint(tmp_path / "native").arrays.values() if a.dtype == np.float32)
    assert size == sum(np.prod(shape) for shape in shapes_of(tiny.config()).values())
    (tmp_path / "native/tokenizer.json").unlink()
    refused = run(
        "-m", "omnifusion_jax.convert", f"--source={tmp_path / 'native'}", f"--output={tmp_path / 'again'}"
    )
    assert (
        refused.returncode == 1 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
    )
    assert (
        "native: no tokenizer for the language model" in refused.stderr and not (tmp_path / "again").exists()
    )


def test_a_source_of_another_format_than_is_asked_for_is_refused(tmp_path):
    done = run(
        "-m",
        "omnifusion_jax.convert",
        "--source=omnifusion-tiny",
        "--format=llava",
        f"--output={tmp_path / 'native'}",
    )
    assert done.returncode == 1 and "of the format omnifusion, not llava" in done.stderr
    assert not (tmp_path / "native").exists()


def test_import_needs_no_torch(source, tmp_path):
    block = "import sys; sys.modules['torch'] = None; "
    code = f"""from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.errors import CheckpointError
found = load_checkpoint({str(source)!r})
export_original(found, {str(tmp_path / "exported")!r}, pickles=False)
try:
    export_original(found, {str(tmp_path / "pickled")!r})
except CheckpointError as error:
    assert "pip install omnifusion-jax[export]" in str(error)
    print("refused")
"""
    done = run("-c", block + code)
    assert done.stdout == "refused\n", done.stderr
    assert load_checkpoint(tmp_path / "exported").config == load_checkpoint(source).config


@pytest.mark.sweep
def test_the_benchmark(tmp_path):
    pytest.importorskip("torch")  # writes projection.pt
    done = run(
        "benchmarks/convert.py",
        "--preset=omnifusion-tiny",
        "--layers=2",
        f"--directory={tmp_path}",
        PYTHONPATH=".",
    )
    assert done.returncode == 0, done.stderr
    size, *steps, end = done.stdout.splitlines()
    assert (
        size.endswith("2 decoder layers")
        and end == "the weights came back the same"
        and not list(tmp_path.iterdir())
    )
    for step, name in zip(steps, ("cp -r", "to native", "back"), strict=True):
        assert re.fullmatch(
            name
            + r" +[\d.]+ s +[\d.]+ GB/s +\d+% of cp's speed, peak [\d.]+ GB resident, [\d.]+ GB anonymous",
            step,
        )
