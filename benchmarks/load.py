"""Measures `of.load`: seconds and peak memory, beside `cp` and safetensors' own reading of the same files.

    python benchmarks/load.py [--preset=llava-1.5-7b] [--layers=4] [--rounds=3] [--directory=DIR]

A model of random weights in bfloat16 is written as transformers has it. By turns it is copied, read into
NumPy by safetensors, and loaded in several forms, also onto a mesh of eight simulated devices, each in a
process of its own, with the files in the page cache. Memory is what a process holds of its own (RssAnon) at
most, less what it held before.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from convert import files, make_source

from omnifusion_jax.models.presets import preset

LOADS = {  # settings of of.load, and the axes of a mesh
    "bfloat16": ({"dtype": "bfloat16"}, None),
    "bfloat16, mesh": ({"dtype": "bfloat16"}, {"fsdp": 4, "tensor": 2}),
    "float32": ({"dtype": "float32"}, None),
    "int8": ({"dtype": "bfloat16", "weights": "int8"}, None),
    "int8, mesh": ({"dtype": "bfloat16", "weights": "int8"}, {"fsdp": 4, "tensor": 2}),
    "int4": ({"dtype": "bfloat16", "weights": "int4"}, None),
}
MESH = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def held():
    """Bytes of memory of its own that this process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) * 1024


def measured(work):
    """(seconds of a call, bytes at most, bytes that its result keeps)"""
    peak, ended = [held()], threading.Event()
    before = peak[0]

    def watch():
        while not ended.wait(0.005):
            peak.append(max(peak.pop(), held()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    after = held()
    del kept
    return seconds, peak[0] - before, after - before


def by_safetensors(source):
    from safetensors.numpy import load_file

    return lambda: [load_file(file) for file in sorted(source.glob("*.safetensors"))]


def by_us(source, name):
    import jax

    import omnifusion_jax as of
    from omnifusion_jax.sharding import make_mesh

    settings, axes = LOADS[name]
    mesh = make_mesh(**axes) if axes else None
    jax.numpy.zeros(1).block_until_ready()

    def work():
        model = of.load(source, mesh=mesh, **settings)
        jax.block_until_ready(jax.tree.leaves(model.module))
        return model

    return work


def side(name, source):
    """(seconds, peak bytes, bytes kept) of a process of its own."""
    words = [sys.executable, __file__, f"--side={name}", f"--source={source}"]
    said = subprocess.run(words, env=MESH, stdout=subprocess.PIPE, text=True, check=True).stdout
    return tuple(map(float, said.split()[-3:]))


def copied(source):
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        start = time.perf_counter()
        shutil.copytree(source, Path(folder, "copy"))
        return time.perf_counter() - start, 0, 0


def main(config, rounds, directory):
    with tempfile.TemporaryDirectory(dir=directory, prefix="load-") as made:
        source = Path(made, "model")
        make_source(source, config, "llava")
        size = sum(file.stat().st_size for file in files(source))
        print(f"{size / 1e9:.2f} GB, {config.decoder.layers} decoder layers")
        found = {}
        for _ in range(rounds):
            for name in ("copy", "safetensors", *LOADS):
                one = copied(source) if name == "copy" else side(name, source)
                found.setdefault(name, []).append(one)
        for name, taken in found.items():
            seconds, peak, kept = (statistics.median(column) for column in zip(*taken, strict=True))
            pairs = zip(taken, found["safetensors"], strict=True)
            times = statistics.median(one[0] / theirs[0] for one, theirs in pairs)
            print(
                f"{name:15} {seconds:6.2f} s {times:5.2f} x safetensors, "
                f"peak {peak / 1e9:.2f} GB, of it kept {kept / 1e9:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=tempfile.gettempdir())
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side == "safetensors":
        print(*measured(by_safetensors(given.source)))
    elif given.side:
        print(*measured(by_us(given.source, given.side)))
    else:
        wanted = preset(given.preset)
        wanted.decoder.layers = given.layers
        main(wanted, given.rounds, given.directory)
