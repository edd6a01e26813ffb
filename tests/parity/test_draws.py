"""Sampled answers against Hugging Face's `generate`: are all as frequent? Chi-squared tests of many draws."""

import collections
import dataclasses

import drive
import numpy as np
import oracle
import pytest
import scipy.stats
import torch

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.inference.options import Sizes

DRAWS = 1500
SIZES = Sizes(drive.CONFIG.vocab, drive.ROOM, beams=3)
G = GenerationConfig(max_new_tokens=2)


@pytest.fixture(scope="module")
def pair():
    """(our decoder, theirs, a prompt)."""
    arrays = drive.arrays(5, sharpness=1.5)
    theirs = oracle.language_of(drive.CONFIG, {f"decoder/{path}": a for path, a in arrays.items()})
    return drive.decoder(arrays), theirs, drive.prompts(5, 1)[0]


@torch.no_grad()
def theirs(model, prompt, **settings):
    torch.manual_seed(0)
    out = model.generate(
        inputs_embeds=torch.tensor(prompt).expand(DRAWS, -1, -1),
        attention_mask=torch.ones(DRAWS, len(prompt), dtype=torch.long),
        do_sample=True,
        eos_token_id=drive.EOS,
        pad_token_id=drive.EOS,
        **{"max_new_tokens": 2, "top_k": 0, **settings},
    )
    return [tuple(row[: row.index(drive.EOS) + 1] if drive.EOS in row else row) for row in out.tolist()]


def alike(ours, other):
    """Asserts that two lists of answers may well be draws of one distribution.

    Answers that are expected less than five times are counted together.
    """
    counts = np.array([[collections.Counter(part)[key] for part in (ours, other)] for key in {*ours, *other}])
    rare = counts.sum(1) < 10
    table = np.concatenate([counts[~rare], counts[rare].sum(0, keepdims=True)])
    table = table[table.sum(1) > 0]
    assert len(table) > 4 and scipy.stats.chi2_contingency(table).pvalue > 1e-3


SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.15},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws(pair, settings):
    """All draws are answers to one request."""
    ours, model, prompt = pair
    g = dataclasses.replace(G, num_return_sequences=DRAWS, seed=1, **settings)
    answer = drive.answers(ours, [prompt], [g], drive.NAMES, SIZES)[0]
    found = [tuple(a.tokens) for a in (answer, *answer.others)]
    assert len(found) == DRAWS
    alike(found, theirs(model, prompt, **settings))


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6, "length_penalty": 0.5}], ids=str
)
def test_beams_that_are_drawn(pair, settings):
    """The best of three, and the worst of them."""
    ours, model, prompt = pair
    g = dataclasses.replace(G, max_new_tokens=3, num_beams=3, num_return_sequences=3, seed=1, **settings)
    answers = drive.answers(ours, [prompt] * DRAWS, [g] * DRAWS, drive.NAMES, SIZES)
    other = theirs(model, prompt, num_beams=3, num_return_sequences=3, **settings | {"max_new_tokens": 3})
    alike([tuple(answer.tokens) for answer in answers], other[::3])
    alike([tuple(answer.others[1].tokens) for answer in answers], other[2::3])
