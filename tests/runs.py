"""Runs of the training loop that take a second: a small model, random pictures, one of a few answers."""

import json

import numpy as np
import tiny

from omnifusion_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches

LENGTH = 80
PHASE1 = ((r"(image/adapter|special)/.*", 1.0), (r"(image/encoders|decoder)/.*", None))
PHASE2 = ((r"(image/adapter|special|decoder)/.*", 1.0), (r"image/encoders/.*", None))


class Pictures:
    """Random pictures with one of a few answers; every fourth dialogue has none."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        picture = (rng.integers(0, 256, (24, 24, 3), np.uint8),) if i % 4 else ()
        answer = " and ".join(["a red circle", "a blue square"][: 1 + i % 2])
        return Dialogue(
            f"pictures[{i}]",
            (("user", "What is in the picture?"), ("assistant", answer)),
            tiny.shown(*picture),
        )


def config(mesh=None, dropout=0.0, **settings):
    settings = {
        "steps": 6,
        "batch_size": 16,
        "train_parts": PHASE2,
        "compute_dtype": "float32",
        "log_every": 1,
        **settings,
    }
    c = TrainConfig(
        model=tiny.config(),
        mesh=mesh or MeshConfig(data=1, fsdp=1),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0.0),
        data=DataConfig(path="pictures", max_length=LENGTH),
        **settings,
    )
    c.model.image.adapter.dropout = dropout
    c.model.decoder.layers, c.model.image.encoders[0].layers = 1, 2  # what is tested does not grow with depth
    c.model.decoder.window = 64  # so that an answer sees every special vector
    return c.validate()


def batches(tokenizer, c, source=None, length=LENGTH, **settings):
    prepare = Prepare.of(tokenizer, c.model, length)
    settings |= {"batch_size": c.batch_size, "length": length, "tiles": prepare.tiles, "seed": c.seed}
    return Batches(source or Pictures(), prepare, **settings)


def start(c):
    return tiny.arrays(c.model)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
