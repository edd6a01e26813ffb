"""Measures what a large JSON or JSONL file costs: time to find its records, memory, time to the first batch.

python benchmarks/million.py [--records=1000000] [--json] [--workers=2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.models.presets import preset


def write_file(path: Path, records: int):
    """Dialogues of four turns, half a kilobyte each."""
    talk = [
        {"from": "human", "value": "What is in the picture, and where does it stand?"},
        {"from": "gpt", "value": "A cat sits on a red mat near the window, and looks out into the garden."},
    ]
    line = json.dumps({"id": "IDENTITY", "conversations": talk * 2})
    begin, between, end = ("[\n", ",\n", "\n]") if path.suffix == ".json" else ("", "\n", "\n")
    with open(path, "w", encoding="utf-8") as out:
        out.write(begin)
        for i in range(records):
            out.write((between if i else "") + line.replace("IDENTITY", f"record-{i:08}"))
        out.write(end)


def resident(process) -> float:
    """Megabytes of a process that it does not share."""
    return process.memory_full_info().uss / 1e6


def open_once(path):
    """Prints what opening costs; run in a process of its own, so that nothing else counts."""
    this = psutil.Process()
    small = path.with_name("small.jsonl")
    write_file(small, 10)
    open_source(str(small), "", 24)
    before, start = resident(this), time.perf_counter()
    source = open_source(str(path), "", 24)
    opened = time.perf_counter() - start
    for i in range(0, len(source), len(source) // 1000):
        assert source[i].where.endswith(f'(id "record-{i:08}")')
    per_record = 1e6 * (resident(this) - before) / len(source)
    print(f"{len(source):,} records opened in {opened:.2f} s, {per_record:.1f} bytes of memory a record")


def first_batch(path, workers):
    start = time.perf_counter()
    prepare = Prepare.of(Tokenizer(locate("omnifusion-tiny-decoder")), preset("omnifusion-1.1"), 2048)
    source = open_source(str(path), "", 24)
    batches = Batches(
        source, prepare, batch_size=64, length=2048, tiles=prepare.tiles, pools=1, num_workers=workers
    )
    next(batches)
    print(f"first batch of 64 after {time.perf_counter() - start:.2f} s")
    for _ in range(100):
        next(batches)
    held = [resident(process) for process in psutil.Process().children() if process.is_running()]
    print("megabytes of each worker after 6,400 records:", *(f"{one:.0f}" for one in held))
    batches.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=10**6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of JSONL")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open:
        return open_once(given.open)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dialogues.json" if given.json else "dialogues.jsonl")
        write_file(path, given.records)
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
        for what in ("without an index:", "with its index:  "):
            print(what, end=" ", flush=True)
            subprocess.run([sys.executable, __file__, f"--open={path}"], check=True)
        first_batch(path, given.workers)


if __name__ == "__main__":
    main()
