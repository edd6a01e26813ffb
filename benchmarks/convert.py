"""Measures memory and speed of conversion.

    python benchmarks/convert.py [--preset=NAME] [--layers=N] [--format=llava] [--directory=DIR]

makes a random model (all of OmniFusion-1.1 by default) in a foreign format, converts it to native and back,
and compares the speed with that of `cp -r` on the same files. Each step begins with its source dropped from
the page cache and ends when everything is on disk. OmniFusion-1.1 needs 46 GB of disk.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from omnifusion_jax.checkpoints.checkpoint import Checkpoint
from omnifusion_jax.checkpoints.llava.export import export_llava
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.models.presets import preset

MEASURES = {"VmHWM": "resident", "RssAnon": "anonymous"}  # lines of /proc/PID/status
WRITERS = {"omnifusion": partial(export_original, pickles=False), "llava": export_llava}


def make_source(directory, config, form):
    """Writes a random model of `config` in the format `form`."""
    arrays = {path: random_array(shape, seed) for seed, (path, shape) in enumerate(shapes_of(config).items())}
    WRITERS[form](Checkpoint(config, arrays, locate("omnifusion-tiny-decoder"), "random"), directory)


def random_array(shape, seed):
    """A lazy array of random bfloat16 numbers between -1 and 1, drawn when they are read."""

    def read(spans):
        rng = np.random.default_rng([seed, *(s.start for s in spans)])
        bits = rng.integers(0, 1 << 16, [s.stop - s.start for s in spans], np.uint16)
        return (bits & 0xBF7F).view(ml_dtypes.bfloat16)

    return Lazy(shape, ml_dtypes.bfloat16, read)


def files(directory):
    return [file for file in Path(directory).rglob("*") if file.is_file()]


def measured(source, *command):
    """Runs a command that reads `source`; returns (seconds, peak bytes by kind of memory)."""
    os.sync()
    for file in files(source):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, peak = time.perf_counter(), dict.fromkeys(MEASURES.values(), 0)
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if name := MEASURES.get(line.partition(":")[0]):
                peak[name] = max(peak[name], int(line.split()[1]) * 1024)
        time.sleep(0.02)
    os.sync()
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - start, peak


def same(a, b):
    """Whether two directories hold the same weights, byte for byte."""
    found = [file.relative_to(a) for file in files(a) if file.suffix == ".safetensors"]
    names = [name for name in found if (b / name).is_file()]  # the adapter comes back as a pickle
    return names and filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def main(directory, config, form):
    source, copy, native, back = (directory / name for name in ("source", "copy", "native", "back"))
    make_source(source, config, form)
    size = sum(file.stat().st_size for file in files(source))
    print(f"{size / 1e9:.2f} GB, {config.decoder.layers} decoder layers")
    convert = sys.executable, "-m", "omnifusion_jax.convert"
    steps = {
        "cp -r": (source, "cp", "-r", source, copy),
        "to native": (source, *convert, f"--source={source}", f"--output={native}"),
        "back": (native, *convert, f"--source={native}", f"--output={back}", f"--to={form}"),
    }
    taken = {}
    for name, command in steps.items():
        taken[name], peak = measured(*command)
        speed = taken["cp -r"] / taken[name]
        memory = ", ".join(f"{size / 1e9:.2f} GB {kind}" for kind, size in peak.items())
        rate = f"{size / taken[name] / 1e9:5.2f} GB/s  {speed:4.0%} of cp's speed"
        print(f"{name:10} {taken[name]:7.1f} s  {rate}, peak {memory}", flush=True)
        shutil.rmtree(copy, ignore_errors=True)
    if not same(source, back):
        sys.exit("the weights came back changed")
    print("the weights came back the same")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="omnifusion-1.1")
    parser.add_argument("--layers", type=int, help="of the decoder")
    parser.add_argument("--format", default="omnifusion", choices=WRITERS)
    parser.add_argument("--directory", type=Path, default=tempfile.gettempdir())
    arguments = parser.parse_args()
    made_of = preset(arguments.preset)
    made_of.decoder.layers = arguments.layers or made_of.decoder.layers
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="convert-") as made:
        main(Path(made), made_of, arguments.format)
