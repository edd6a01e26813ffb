"""Measures how fast pictures are read, decoded, resized, laid out and collected into batches.

python benchmarks/data_pipeline.py [--workers=1] [--rounds=3] [--large]

In turns on the same cores: a plain Pillow loop in as many processes, this pipeline, and PyTorch's DataLoader
with the CLIP processor of transformers (if PyTorch is installed). On JPEGs of 640 x 480, or with --large of
12 megapixels (in batches of 8, which take as long). Prints the median of the rounds, the share of the Pillow
loop, and the CPU time that the main process spends on a batch.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.models.presets import preset

SIZE = 336


def write_set(folder: Path, size, count: int) -> Path:
    """A JSONL file of `count` dialogues about different pictures of (width, height) pixels."""
    rng = np.random.default_rng(0)
    with open(folder / "dialogues.jsonl", "w", encoding="utf-8") as out:
        for i in range(count):
            # coarse shapes and fine noise: about as many bytes as a photograph has
            coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
            pixels = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(
                np.int16
            )
            pixels += rng.integers(-12, 13, pixels.shape, np.int16)
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(folder / f"{i}.jpg", quality=90)
            talk = [
                {"from": "human", "value": "<image>\nWhat is in the picture, and where?"},
                {"from": "gpt", "value": "A cat sits on a red mat near the window. " * 5},
            ]
            out.write(json.dumps({"id": str(i), "image": f"{i}.jpg", "conversations": talk}) + "\n")
    return folder / "dialogues.jsonl"


def plain(path: Path) -> np.ndarray:
    """What any loader must do: read, decode, resize the short side, cut the centre out."""
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - SIZE) // 2 for side in image.size)
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


def plain_loop(paths, seconds, rate):
    """Goes through the pictures for so many seconds and gives pictures a second."""
    count, start = 0, time.perf_counter()
    for path in itertools.cycle(paths):
        plain(path)
        count += 1
        if time.perf_counter() - start > seconds:
            break
    rate.put(count / (time.perf_counter() - start))


def pillow(folder, workers, seconds, _):
    paths, rate = sorted(folder.glob("*.jpg")), multiprocessing.Queue()
    run = [multiprocessing.Process(target=plain_loop, args=(paths, seconds, rate)) for _ in range(workers)]
    for process in run:
        process.start()
    return sum(rate.get() for _ in run), None


def ours(folder, workers, seconds, batch):
    prepare = Prepare.of(Tokenizer(locate("omnifusion-tiny-decoder")), preset("omnifusion-1.1"), 2048)
    source = open_source(str(folder / "dialogues.jsonl"), str(folder), 24)
    batches = Batches(
        source, prepare, batch_size=batch, pools=1, length=2048, tiles=prepare.tiles, num_workers=workers
    )
    return rate_of(batches, batch, seconds, batches.close)


def torch_loader(folder, workers, seconds, batch):
    import torch
    from transformers import CLIPImageProcessorPil

    processor, tokenizer = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE), None
    tokenizer = Tokenizer(locate("omnifusion-tiny-decoder"))
    records = [json.loads(line) for line in (folder / "dialogues.jsonl").read_text().splitlines()]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(records) * 1000

        def __getitem__(self, i):
            record = records[i % len(records)]
            picture = Image.open(folder / record["image"]).convert("RGB")
            ids = [t for turn in record["conversations"] for t in tokenizer.encode(turn["value"])]
            tokens = torch.zeros(2048, dtype=torch.int32)
            tokens[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
            return processor(picture, return_tensors="pt")["pixel_values"][0], tokens

    loader = iter(torch.utils.data.DataLoader(Pictures(), batch, shuffle=False, num_workers=workers))
    return rate_of(loader, batch, seconds, lambda: None)


def rate_of(batches, batch, seconds, close):
    """(pictures a second, CPU milliseconds of this process a batch); the first two batches do not count."""
    next(batches), next(batches)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds or count < 2:
        next(batches)
        count += 1
    found = count * batch / (time.perf_counter() - start), 1e3 * (time.process_time() - cpu) / count
    close()
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args()
    size, count, batch = ((4000, 3000), 12, 8) if given.large else ((640, 480), 256, 64)
    loaders = {"Pillow loop": pillow, "this pipeline": ours, "PyTorch DataLoader": torch_loader}
    found = {name: [] for name in loaders}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_set(folder, size, count)
        for _ in range(given.rounds):
            for name, loader in loaders.items():
                try:
                    found[name].append(loader(folder, given.workers, given.seconds, batch))
                except ImportError as error:
                    print(f"{name}: {error}")
    base = statistics.median(rate for rate, _ in found["Pillow loop"])
    print(f"{size[0]} x {size[1]}, {given.workers} processes, batches of {batch}")
    for name, rounds in found.items():
        if rounds:
            rate = statistics.median(rate for rate, _ in rounds)
            cpu = [cpu for _, cpu in rounds if cpu is not None]
            main_process = f"{statistics.median(cpu):6.1f} ms of the main process a batch" if cpu else ""
            print(f"{name:20} {rate:8.1f} pictures/s {rate / base:6.2f} of the loop  {main_process}")


if __name__ == "__main__":
    main()
