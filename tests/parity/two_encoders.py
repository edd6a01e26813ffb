"""The published two-encoder layout, with an adapter under invented names."""

import json
import sys
import types

import tiny
import torch
import transformers
from parity.torch_models import Original, language, randomised

from omnifusion_jax.data.tokenizer import Tokenizer

WIDTH, LAYERS = 32, 2
CROPPED = {
    "do_resize": True, "size": {"shortest_edge": 20},
    "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
}  # fmt: skip


class VisualToGPTMapping(torch.nn.Module):
    """What the unpublished class may have looked like: attributes, no module lists."""

    def __init__(self, names, out):
        super().__init__()
        for name in names:
            for n in range(LAYERS + 1):
                setattr(self, f"{name}_proj_{n}", torch.nn.Linear(WIDTH, WIDTH))
            setattr(self, f"{name}_norm", torch.nn.LayerNorm(WIDTH))
            setattr(self, f"{name}_coef", torch.nn.Parameter(torch.ones(LAYERS + 1)))
        self.out = torch.nn.Linear(WIDTH, out)


VisualToGPTMapping.__module__, VisualToGPTMapping.__qualname__ = "models", "VisualToGPTMapping"


def build(directory, monkeypatch, names):
    """Everything but the tokenizer's training is made by PyTorch and transformers."""
    c = tiny.config().decoder
    tiny.make_tokenizer(directory / "tokenizer")
    language(c).to(torch.bfloat16).save_pretrained(directory / "tuned-model")
    block = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(**block, intermediate_size=48, image_size=24, patch_size=8)
    dino = transformers.Dinov2Config(**block, mlp_ratio=2, image_size=40, patch_size=8)
    for name, model in (
        ("z-clip", transformers.CLIPVisionModel(clip)),
        ("a-dino", transformers.Dinov2Model(dino)),
    ):
        randomised(model, 5).to(torch.bfloat16).save_pretrained(directory / name)
    (directory / "a-dino/preprocessor_config.json").write_text(json.dumps(CROPPED))
    module = types.ModuleType("models")
    module.VisualToGPTMapping = VisualToGPTMapping
    monkeypatch.setitem(sys.modules, "models", module)
    adapter = randomised(VisualToGPTMapping(names, c.width), 7).to(torch.bfloat16)
    torch.save(adapter, directory / "projection.pt")
    torch.save(
        {
            name: torch.full((c.width,), n, dtype=torch.bfloat16)
            for n, name in enumerate(("USER", "BOT", "SOI", "EOI"))
        },
        directory / "special_embeddings.pt",
    )
    return adapter


class Both(Original):
    """The whole model in float32, of the files that `build` wrote, in PyTorch's words.

    Projection and summation: arXiv 2404.06212, section 3.1.
    """

    def __init__(self, directory, adapter):
        self.config, self.tokenizer, self.adapter = (
            tiny.config(),
            Tokenizer(directory / "tokenizer"),
            adapter.float().eval(),
        )
        self.llm = transformers.MistralForCausalLM.from_pretrained(
            directory / "tuned-model", dtype=torch.float32
        )
        self.special = {
            name: vector.float() for name, vector in torch.load(directory / "special_embeddings.pt").items()
        }
        crops = {
            "clip": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
            "dino": CROPPED,
        }
        classes = {
            "clip": ("z-clip", transformers.CLIPVisionModel),
            "dino": ("a-dino", transformers.Dinov2Model),
        }
        self.processors = {name: transformers.CLIPImageProcessorPil(**crop) for name, crop in crops.items()}
        self.towers = {
            name: cls.from_pretrained(directory / folder, dtype=torch.float32)
            for name, (folder, cls) in classes.items()
        }

    def combined(self, name, picture):
        """[tokens, width]: every hidden state without its class token, normed, mapped and weighted."""
        pixels = self.processors[name](picture, return_tensors="pt")["pixel_values"]
        states = self.towers[name](pixels, output_hidden_states=True).hidden_states
        norm, factors = getattr(self.adapter, f"{name}_norm"), getattr(self.adapter, f"{name}_coef")
        return sum(
            factors[n] * getattr(self.adapter, f"{name}_proj_{n}")(norm(state[0, 1:]))
            for n, state in enumerate(states)
        )

    def features(self, picture):
        clip, dino = self.combined("clip", picture), self.combined("dino", picture)
        dino = torch.nn.functional.pad(dino, (0, 0, 0, len(clip) - len(dino)))
        return self.adapter.out(torch.nn.functional.gelu(clip + dino))
