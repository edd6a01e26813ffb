"""OmniLMM-12B and MiniCPM-V 2.0 with two layers in their full width, from public files, against PyTorch.

All of it is computed in float32. What is cut, so that a test takes less than 2.5 GB: layers but two of each
stack; the vocabulary, whose rows are as wide as ever, to a few hundred; and MiniCPM-V's slices. Values are
rounded to bfloat16, which keeps files and our kernels at half the room and loses nothing where they multiply.
The model of PyTorch holds the parameters of a part only while that part runs, and none while ours runs;
what ours has before the decoder's layers is gone when these are read.
"""

import gc
import json
import re

import jax.numpy as jnp
import numpy as np
import omnilmm_models as published
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.initialization import no_init_weights

import omnifusion_jax as of
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.prompts import assemble, lay_out
from omnifusion_jax.models.answering import STACK, apart, outline
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec
from omnifusion_jax.training.step import KERNELS

EVA = {"width": 1792, "layers": 2, "heads": 16, "mlp": 15360, "patch": 14, "grid": 16}
SO400M = {"width": 1152, "layers": 2, "heads": 16, "mlp": 4304, "patch": 14, "grid": 27}
SYSTEMS = {
    "omnilmm": {
        "tower": EVA, "num_query": 64, "image_size": 448, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2,
    },
    "minicpm-v-2.0": {
        "tower": SO400M, "query_num": 64, "image_size": 448, "scale_resolution": 448, "patch_size": 14,
        "max_slice_nums": 1, "hidden_size": 2304, "intermediate_size": 5760, "num_attention_heads": 36,
        "num_key_value_heads": 36, "num_hidden_layers": 2, "dim_model_base": 256,
    },
}  # fmt: skip
QUESTION = "What is in the picture?"
SPREAD, SHARP = 0.02, 4  # of parameters; the head's is larger, so that scores tell tokens apart

pytestmark = pytest.mark.sweep


def on_disk(name, directory):
    """A system whose parameters are drawn into files, a few at a time, and are nowhere else."""
    with no_init_weights():  # so that no page of theirs is touched
        model = published.Whole(name, draw=lambda module, seed: module, **SYSTEMS[name])
    published.describe(model, directory)
    parameters, places = model.tensors(parameters=True), {}
    tensors, generator = model.tensors(), torch.Generator().manual_seed(0)
    for number, key in enumerate(tensors):
        a = tensors[key]
        if key in parameters:
            a = torch.randn(a.shape, generator=generator) * SPREAD * (SHARP if "lm_head" in key else 1)
            a += "norm" in key and key.endswith("weight")
        places[key] = f"model-{number}.safetensors"
        save_file({key: a.bfloat16()}, directory / places[key])
    index = {"weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = {id(p): (directory / places[key], key) for key, p in parameters.items()}
    # The tower and the resampler as wholes; of the language model what has parameters of its own
    parts = [(part, True) for part in (model.tower, model.tower.norm, model.resampler)]
    for part, recurse in parts + [(part, False) for part in model.llm.modules()]:
        own = [p for p in part.parameters(recurse) if id(p) in stored]
        part.register_forward_pre_hook(lambda *_, own=own: fill(own, stored))
        part.register_forward_hook(lambda *_, own=own: empty(own))
    empty(model.parameters())
    return model


def fill(parameters, stored):
    for p in parameters:
        file, key = stored[id(p)]
        with safe_open(file, "pt") as tensors:
            p.data = tensors.get_tensor(key).float()


def empty(parameters):
    for p in parameters:
        p.data = torch.empty(0)


def seen(name, picture):
    """As the towers see 640 x 480 pixels: OmniLMM squashes them, MiniCPM-V 2.0 fits them to its patches."""
    return picture.resize((448, 448) if name == "omnilmm" else (518, 392), Image.Resampling.BICUBIC)


def kept(arrays, paths=r".*"):
    """As training keeps what it tunes: kernels as they are stored, which are cast where they multiply."""
    types = {path: a.dtype if re.fullmatch(KERNELS, path) else np.float32 for path, a in arrays.items()}
    return {path: jnp.asarray(a, types[path]) for path, a in arrays.items() if re.fullmatch(paths, path)}


def logits(c, arrays, batch):
    """float32[batch, seq, vocab] of the model: first what stands before the decoder's layers, then those.

    Nothing is compiled as a whole, which would make float32 values of all kernels at once.
    """
    front = abstract(c)
    front.decoder.layers = nnx.List([])
    x = nnx.with_parameters(front, kept(arrays, rf"(?!{STACK}).*")).embed(batch)
    own = {path.removeprefix("decoder/"): a for path, a in kept(arrays, "decoder/.*").items()}
    decoder = nnx.with_parameters(outline(c, arrays).decoder, own)
    spec = AttentionSpec.of(batch.segments, batch.positions, c.decoder.window)
    return np.asarray(decoder.logits(decoder(x, spec)[0]))


@pytest.mark.parametrize("name", SYSTEMS)
def test_logits_of_a_picture(name, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    picture = Image.fromarray(colours).resize((640, 480), Image.Resampling.NEAREST)
    model = on_disk(name, tmp_path)
    with torch.no_grad():
        embeds = published.expected_inputs(
            model, tmp_path, [("user", "{}" + QUESTION)], [seen(name, picture)], [(0, 0)]
        )
        theirs = model.llm(inputs_embeds=embeds).logits[0].numpy()
    del model
    gc.collect()
    found = load_checkpoint(tmp_path)
    prepare = Prepare.of(Tokenizer(found.tokenizer), found.config, 1024)
    asked = of.Request([{"role": "user", "content": QUESTION}], [picture])
    batch = assemble([lay_out(asked, "here", prepare)], prepare)
    ours = logits(found.config, apart(found.arrays, Lazy.row), batch)[0][batch.kind[0] > 0]
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
