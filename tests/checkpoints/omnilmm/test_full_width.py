"""OmniLMM-12B and MiniCPM-V 2.0 with two layers in their full width, from public files, against PyTorch.

Vocabularies are cut. Weights are rounded to bfloat16, which files hold in half the room, and computed with in
float32. Zephyr's decoder is apart from OmniLMM's tower, and its feed-forward parts are cut to a quarter: all
of it would take more memory than a test may. For the same reason MiniCPM-V has no slices here.
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import omnilmm_models as published
import pytest
import torch
from parity import test_decoders as decoders
from parity.torch_models import randomised
from PIL import Image
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

import omnifusion_jax as of
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.prompts import assemble, lay_out
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx

EVA = {"width": 1792, "layers": 2, "heads": 16, "mlp": 15360, "patch": 14, "grid": 16}
SO400M = {"width": 1152, "layers": 2, "heads": 16, "mlp": 4304, "patch": 14, "grid": 27}
ZEPHYR = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2}
SYSTEMS = {
    "omnilmm": {
        "tower": EVA, "num_query": 64, "image_size": 448, **ZEPHYR,
        "intermediate_size": 64, "num_hidden_layers": 1,
    },
    "minicpm-v-2.0": {
        "tower": SO400M, "query_num": 64, "image_size": 448, "scale_resolution": 448, "patch_size": 14,
        "max_slice_nums": 1, "hidden_size": 2304, "intermediate_size": 5760, "num_attention_heads": 36,
        "num_key_value_heads": 36, "num_hidden_layers": 2, "dim_model_base": 256,
    },
}  # fmt: skip
QUESTION = "What is in the picture?"

pytestmark = pytest.mark.sweep


def rounded(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def seen(name, picture):
    """As the towers see 640 x 480 pixels: OmniLMM squashes them, MiniCPM-V 2.0 fits them to its patches."""
    return picture.resize((448, 448) if name == "omnilmm" else (518, 392), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", SYSTEMS)
def test_logits_of_a_picture(name, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    picture = Image.fromarray(colours).resize((640, 480), Image.Resampling.NEAREST)
    model = rounded(published.Whole(name, spread=0.02, **SYSTEMS[name]))
    published.save(model, tmp_path, torch.bfloat16)
    with torch.no_grad():
        embeds = published.expected_inputs(
            model, tmp_path, [("user", "{}" + QUESTION)], [seen(name, picture)], [(0, 0)]
        )
        theirs = model.llm(inputs_embeds=embeds).logits[0].numpy()
    del model
    gc.collect()
    found = load_checkpoint(tmp_path, dtype="float32")
    prepare = Prepare.of(Tokenizer(found.tokenizer), found.config, 1024)
    asked = of.Request([{"role": "user", "content": QUESTION}], [picture])
    batch = assemble([lay_out(asked, "here", prepare)], prepare)
    # stacked, as they are read: layers that stand apart, as answering has them, would be a second copy
    module = nnx.with_parameters(
        abstract(found.config), {path: jnp.asarray(a) for path, a in found.arrays.items()}
    )
    ours = np.asarray(jax.jit(lambda module: module(batch))(module))[0][batch.kind[0] > 0]
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_logits_of_zephyr(tmp_path):
    settings = {**published.TEXT, **ZEPHYR, "intermediate_size": 3584, "sliding_window": 4096}
    model = MistralForCausalLM(MistralConfig(**settings, attn_implementation="eager"))
    rounded(randomised(model, 0, spread=0.02))
    model.config.save_pretrained(tmp_path)
    tensors = {name: a.bfloat16() for name, a in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    c, arrays = language_models.read(tmp_path, np.float32)
    ids = decoders.tokens(c)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits
    del model, tensors
    gc.collect()
    decoders.close(jax.jit(decoders.logits)(decoders.built(c, arrays), ids), theirs)
