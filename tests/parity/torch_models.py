"""The original system in PyTorch: Hugging Face's CLIP and Mistral, and the adapter.

It also makes embeddings, labels and a loss of a dialogue.
"""

import numpy as np
import torch
from models import VisualToGPTMapping
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip

torch.set_num_threads(1)


def randomised(module, seed, spread=0.15):
    """Every parameter drawn anew, biases and norms too: at their initial 0 and 1 they would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * spread
                + ("norm" in name and name.endswith("weight"))
            )
    return module.eval()


def vision(c):
    return randomised(
        CLIPVisionModel(
            CLIPVisionConfig(**clip.CLIP.encoder_json(c, "float32"), attn_implementation="eager")
        ),
        1,
    )


def language(c):
    return randomised(
        MistralForCausalLM(
            MistralConfig(**language_models.decoder_json(c, "float32"), attn_implementation="eager")
        ),
        2,
    )


def adapter(c):
    [encoder], a = c.image.encoders, c.image.adapter
    return randomised(VisualToGPTMapping(encoder.width, c.decoder.width, encoder.patches, a.heads, a.mlp), 3)


def pixels(c, images):
    """uint8[n, size, size, 3] to what CLIPImageProcessor gives: float32[n, 3, size, size]."""
    x = torch.tensor(images).float() / 255
    return ((x - torch.tensor(c.mean)) / torch.tensor(c.std)).permute(0, 3, 1, 2)


def attention_state(p, path):
    """State of a `torch.nn.MultiheadAttention` from our parameters by path, those under `path`."""
    kernels, biases = (
        {n: p[f"{path}/{n}/{kind}"] for n in ("query", "key", "value", "out")} for kind in ("kernel", "bias")
    )
    width = len(biases["out"])
    matrices = {n: torch.tensor(np.asarray(a)).reshape(width, width).T for n, a in kernels.items()}
    vectors = {n: torch.tensor(np.asarray(a)).reshape(width) for n, a in biases.items()}
    return {
        "in_proj_weight": torch.cat([matrices[n] for n in ("query", "key", "value")]),
        "in_proj_bias": torch.cat([vectors[n] for n in ("query", "key", "value")]),
        "out_proj.weight": matrices["out"],
        "out_proj.bias": vectors["out"],
    }


def layer_state(p, path):
    """State of a `torch.nn.TransformerEncoderLayer` likewise."""
    ours = {"linear1": "feed_forward/up", "linear2": "feed_forward/down", "norm1": "norm1", "norm2": "norm2"}
    state = {f"self_attn.{name}": t for name, t in attention_state(p, f"{path}/attention").items()}
    for theirs, name in ours.items():
        weight = p[f"{path}/{name}/scale"] if "norm" in name else p[f"{path}/{name}/kernel"].T
        state |= {f"{theirs}.weight": weight, f"{theirs}.bias": p[f"{path}/{name}/bias"]}
    return {name: torch.tensor(np.asarray(a)) for name, a in state.items()}


class Original:
    """The whole model. A sample is (uint8[1, size, size, 3] or None, [(is_answer, text), ...])."""

    def __init__(self, c, tokenizer):
        self.config, self.tokenizer = c, tokenizer
        self.clip, self.adapter, self.llm = vision(c.image.encoders[0]), adapter(c), language(c.decoder)
        generator = torch.Generator().manual_seed(4)
        self.special = {
            name: torch.randn(c.decoder.width, generator=generator).mul(0.15).requires_grad_()
            for name in ("USER", "BOT", "SOI", "EOI")
        }

    def features(self, images):
        with torch.no_grad():
            seen = self.clip(
                pixels(self.config.image.encoders[0], images), output_hidden_states=True
            ).hidden_states[-2]
        return self.adapter(seen[:, 1:])[0]

    def lay_out(self, image, turns):
        """Embeddings [seq, width], token ids [seq], and which tokens are an answer's [seq].

        Token 0 stands where a vector is.
        """
        pieces = [(self.tokenizer.encode(self.config.prompt), None, False)]
        if image is not None:
            features = self.features(image)
            pieces += [
                ([0], self.special["SOI"][None], False),
                ([0] * len(features), features, False),
                ([0], self.special["EOI"][None], False),
            ]
        for is_answer, text in turns:
            pieces += [
                ([0], self.special["BOT" if is_answer else "USER"][None], False),
                (self.tokenizer.encode(text), None, is_answer),
            ]
        ids = torch.tensor([i for tokens, _, _ in pieces for i in tokens])
        answer = torch.tensor([flag for tokens, _, flag in pieces for _ in tokens])
        table = self.llm.model.embed_tokens
        return (
            torch.cat([table(torch.tensor(tokens)) if rows is None else rows for tokens, rows, _ in pieces]),
            ids,
            answer,
        )

    def logits(self, image, turns):
        embeddings, _, _ = self.lay_out(image, turns)
        return self.llm(inputs_embeds=embeddings[None]).logits[0]

    def loss(self, samples):
        """Mean over the answers' tokens of a micro-batch; an unknown token costs nothing but is counted."""
        terms = []
        for image, turns in samples:
            embeddings, ids, answer = self.lay_out(image, turns)
            logits = self.llm(inputs_embeds=embeddings[None]).logits[0, :-1]
            terms.append(
                torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none", ignore_index=0)[
                    answer[1:]
                ]
            )
        return torch.cat(terms).mean()

    def tensors(self):
        """All state dicts, by part."""
        return {
            "image/encoders/0": self.clip.state_dict(),
            "image/adapter": self.adapter.state_dict(),
            "special": self.special,
            "decoder": self.llm.state_dict(),
        }

    def gradients(self):
        return {
            "image/adapter": {name: p.grad for name, p in self.adapter.named_parameters()},
            "special": {name: p.grad for name, p in self.special.items()},
            "decoder": {name: p.grad for name, p in self.llm.named_parameters()},
        }
