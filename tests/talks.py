"""Small data sets on disk, and what is gathered of them."""

import json

import numpy as np
from PIL import Image

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import DataConfig, MeshConfig, SetConfig, TrainConfig
from omnifusion_jax.data.reading import open_reading
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.data_report.gather import begin
from omnifusion_jax.models.presets import preset
from omnifusion_jax.tables import OBJECTIVES


def talk(i, answer="a cat", image=None, question="What?", **fields):
    mark = "<image>\n" if image else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": f"r{i}", "image": image, "conversations": turns, **fields}


def picture(path, width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def broken(path):
    """A picture with a header, and without its end."""
    picture(path)
    path.write_bytes(path.read_bytes()[:-400])


def write(folder, records, name="d.jsonl"):
    """A file of records; a string is a line as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
    text = "\n".join(lines) if name.endswith(".jsonl") else f"[{', '.join(lines)}]"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def config(*paths, images="", batch_size=2, steps=1000, **data):
    """Of the tiny model; several paths are sets named a, b, ..."""
    if len(paths) > 1:
        names = zip("abcdef", paths, strict=False)
        data["sets"] = tuple(SetConfig(name=name, path=str(p), images=str(images)) for name, p in names)
    else:
        data |= {"path": str(paths[0]), "images": str(images)}
    return TrainConfig(
        model=preset("omnifusion-tiny"),
        tokenizer="omnifusion-tiny-decoder",
        train_parts=((".*", 1.0),),
        batch_size=batch_size,
        steps=steps,
        mesh=MeshConfig(data=1, fsdp=1),
        data=DataConfig(**{"max_length": 256, "check": "off"} | data),
    ).validate()


def tokenizer():
    return Tokenizer(locate("omnifusion-tiny-decoder"))


def opened(c):
    return open_reading(c.data, c.model, tokenizer(), OBJECTIVES[c.objective].pairs)


def gathered(c):
    """(Reading, Gathered) of a whole data set, read in this process."""
    data = opened(c)
    found, look = begin(data, c.data)
    for portion in found.portions():
        found.add(portion, look(portion))
    return data, found
