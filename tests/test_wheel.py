"""A wheel holds all that the package needs, and works where no checkout is near."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
HEAVY = ("torch", "transformers", "tensorflow", "tensorflow_datasets", "pyarrow", "ml_collections")
USE = f"""
import json, runpy, sys
import omnifusion_jax, omnifusion_jax.training.loop
heavy = [name for name in {HEAVY} if name in sys.modules]
from omnifusion_jax import shipped
from omnifusion_jax.checkpoints.storage.bundled import BUNDLED, locate
found = {{name: list(shipped.module(name).VARIANTS) for name in shipped.names()}}
for name, variants in found.items():
    for variant in ("", *(":" + variant for variant in variants if variant)):
        shipped.load(name + variant).validate()
assert all((locate(name)).is_dir() for name in BUNDLED)
print(json.dumps([omnifusion_jax.__file__, str(shipped.FOLDER), heavy, found]))
sys.argv = ["train", "--config=sft", "--help"]
runpy.run_module("omnifusion_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("omnifusion_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, folder], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_every_file_is_there(unpacked):
    files = lambda folder: {
        str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts
    }
    expected = files(ROOT / "omnifusion_jax") | {f"configs/{name}" for name in files(ROOT / "configs")}
    assert files(unpacked / "omnifusion_jax") == expected


def test_it_finds_configs_and_assets_and_explains_itself(unpacked, tmp_path):
    """Far from any checkout: configs by name, --help from the wheel's sources, nothing heavy imported."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]  # that of --help
    said, text = done.stdout.split("\n", 1)
    file, folder, heavy, found = json.loads(said)
    assert file == str(unpacked / "omnifusion_jax/__init__.py") and folder == str(
        unpacked / "omnifusion_jax/configs"
    )
    assert heavy == []
    tables = {f"report/table{n}" for n in (4, 5, 6)}
    named = {"dpo", "minicpmv", "omnilmm", "pretrain", "sft", "sft_lora", "tiny", "report/mixture"}
    assert set(found) == named | tables
    assert "original" in found["sft"] and "real" in found["tiny"] and "internvit-6b" in found["report/table4"]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("python -m omnifusion_jax.train --config=")
    assert "optimizer.clip float | None 1.0 largest global gradient norm; None: no clipping" in lines
    assert any(line.startswith("--workdir Where checkpoints, metrics") for line in lines)
    assert max(map(len, text.splitlines()[3:])) <= 110
