"""Language models of Hugging Face with our parameters, and their `generate`."""

import numpy as np
import torch
import transformers

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.mapping import tensors

torch.set_num_threads(1)


def empty(c):
    """The class of the family that `c` names, in its settings."""
    model = getattr(transformers, language_models.FAMILIES[c.family].architecture)
    return model(
        model.config_class(**language_models.decoder_json(c, "float32"), attn_implementation="eager")
    )


def language_of(c, arrays):
    """The same with the parameters under `decoder/`."""
    model = empty(c)
    mine = {path: a for path, a in arrays.items() if path.startswith("decoder/")}
    theirs = {
        name: torch.tensor(np.array(a))
        for name, a in tensors.to_foreign(mine, language_models.table(c)).items()
    }
    model.load_state_dict(theirs | ({language_models.HEAD: theirs[language_models.EMBED]} if c.tied else {}))
    return model.eval()


@torch.no_grad()
def generate(model, prompts, limit, eos, **settings):
    """Generated tokens for `prompts` (float32[T, width] each), padded on the left.

    What follows the first end of sequence is cut off.
    """
    longest = max(map(len, prompts))
    x, mask = (
        torch.zeros(len(prompts), longest, prompts[0].shape[1]),
        torch.zeros(len(prompts), longest, dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        x[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = (
            torch.tensor(np.array(prompt)),
            1,
        )
    out = model.generate(
        inputs_embeds=x,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=eos,
        **settings,
    )
    return [row[: row.index(eos) + 1] if eos in row else row for row in out.tolist()]
