"""Compares what this library and transformers generate with the same weights. Needs PyTorch.

    python examples/llava_side_by_side.py [DIRECTORY]

gives the bundled model an MLP adapter and writes it in LLaVA's format, into DIRECTORY if one is given. Then
it asks both libraries the same questions about synthetic pictures, greedily and with three beams, and fails
if a token differs. The first layer of the adapter is random, so the answers are not good ones.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import omnifusion_jax as of
from omnifusion_jax.checkpoints.llava.export import export_llava
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.config import adapter
from omnifusion_jax.data.sources import SyntheticSource
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.model import Model

QUESTIONS, TOKENS = 6, 12


def with_mlp():
    """The bundled model with an adapter of two linear maps, the second of which is the trained one."""
    found = load_checkpoint("omnifusion-tiny", dtype="float32")
    width = found.config.decoder.width
    image = dataclasses.replace(found.config.image, adapter=adapter("mlp", mlp=width))
    config = dataclasses.replace(found.config, image=image)
    [encoder] = config.image.encoders
    kept = ("image/adapter/linear/kernel", "image/adapter/linear/bias")
    arrays = {
        path: np.asarray(a)
        for path, a in found.arrays.items()
        if not path.startswith("image/adapter/") or path in kept
    }
    drawn = np.random.default_rng(0).normal(size=(encoder.width, width))
    arrays["image/adapter/up/kernel"] = drawn.astype(np.float32) * 0.1
    arrays["image/adapter/up/bias"] = np.zeros(width, np.float32)
    return dataclasses.replace(found, config=config, arrays=arrays)


@torch.no_grad()
def transformers_says(model, processor, pictures, questions, beams):
    """Token ids of transformers' answers to all questions, in one batch."""
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in messages]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=TOKENS, num_beams=beams)
    rows = generated[:, inputs["input_ids"].shape[1] :].tolist()
    end = processor.tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def main(directory):
    checkpoint, source = with_mlp(), SyntheticSource("held-out", 6)
    export_llava(checkpoint, directory)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    ours = Model(checkpoint.config, checkpoint.arrays, Tokenizer(checkpoint.tokenizer))
    dialogues = [source[i] for i in range(QUESTIONS)]
    pictures = [Image.fromarray(d.images[0]) for d in dialogues]
    questions = [d.turns[0][1].replace("<image>\n", "") for d in dialogues]
    requests = [
        of.Request([{"role": "user", "content": q}], images=[p])
        for q, p in zip(questions, pictures, strict=True)
    ]
    for beams in (1, 3):
        generation = of.GenerationConfig(max_new_tokens=TOKENS, num_beams=beams)
        mine = [answer.tokens for answer in ours.generate(requests, generation)]
        theirs = transformers_says(model, processor, pictures, questions, beams)
        print(f"{'greedy' if beams == 1 else f'{beams} beams':34} {'omnifusion_jax':16} transformers")
        for question, a, b in zip(questions, mine, theirs, strict=True):
            print(f"{question:34} {' '.join(map(str, a)):16} {' '.join(map(str, b))}")
        assert mine == theirs


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "llava")
