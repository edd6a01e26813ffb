"""PyTorch models that hold our parameters, and what Hugging Face's `generate` makes of them."""

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

from omnifusion_jax.checkpoints import clip, engine, mistral, original

torch.set_num_threads(1)


def load(module, tensors):
    module.load_state_dict({name: torch.tensor(np.array(a)) for name, a in tensors.items()})
    return module.eval()


def mistral_of(c, arrays):
    """`MistralForCausalLM` with the parameters under `decoder/`."""
    config = MistralConfig(**{**mistral.decoder_json(c, "float32"), "attn_implementation": "eager", "eos_token_id": 2, "bos_token_id": 1})
    mine = {path: a for path, a in arrays.items() if path.startswith("decoder/")}
    return load(MistralForCausalLM(config), engine.to_foreign(mine, mistral.table(c)))


def clip_of(c, arrays):
    """`CLIPVisionModel` with the parameters under `encoders/0/`."""
    mine = {path: a for path, a in arrays.items() if path.startswith("encoders/0/")}
    tensors = {name.removeprefix(clip.PREFIX): a for name, a in engine.to_foreign(mine, clip.table(c)).items()}
    return load(CLIPVisionModel(CLIPVisionConfig(**clip.encoder_json(c, "float32"))), tensors)


class Adapter(torch.nn.Module):
    def __init__(self, width, out, heads, mlp):
        super().__init__()
        self.transformer_layer = torch.nn.TransformerEncoderLayer(width, heads, mlp, batch_first=True)
        self.linear = torch.nn.Linear(width, out)

    def forward(self, x):
        return self.linear(self.transformer_layer(x))


def adapter_of(c, arrays):
    mine = {path: a for path, a in arrays.items() if path.startswith("adapter/")}
    adapter = Adapter(c.encoder.embed, c.decoder.embed, c.adapter.heads, c.adapter.mlp)
    return load(adapter, engine.to_foreign(mine, original.adapter_table(c)))


def until_eos(row, eos):
    """Generated tokens without the padding that follows the first end of sequence."""
    row = list(map(int, row))
    return row[: row.index(eos) + 1] if eos in row else row


@torch.no_grad()
def generate(model, prompts, g, eos, limit, banned=(), **more):
    """Tokens Hugging Face generates after `prompts` (a list of float32[T, embed]) under our GenerationConfig `g`, greedy or with beams."""
    longest = max(map(len, prompts))
    x = torch.zeros(len(prompts), longest, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        x[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(np.array(prompt)), 1
    settings = {
        "num_beams": g.num_beams,
        "early_stopping": g.early_stopping,
        "length_penalty": g.length_penalty,
        "no_repeat_ngram_size": g.no_repeat_ngram_size,
        "bad_words_ids": [list(ids) for ids in banned] or None,
        "forced_eos_token_id": eos if g.forced_eos else None,
    }
    out = model.generate(
        inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=eos, pad_token_id=eos, **{**settings, **more}
    )
    return [until_eos(row, eos) for row in out.tolist()]
