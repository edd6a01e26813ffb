"""Generated tokens against Hugging Face's `generate`, token by token."""

import dataclasses
import itertools

import drive
import numpy as np
import oracle
import pytest
import tiny
import torch
from parity import torch_models
from PIL import Image

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.omnifusion import original
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.inference.model import Model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Passing `no_repeat_ngram_size`"
)  # to generated tokens only: that is what is wanted

MODELS = ((0, 1.0), (1, 0.6), (2, 1.6))  # seed, and how loud the end of sequence is
BANNED = ((5,), (7, 8), (9, 9, 9), (11, 3), (drive.EOS,))


@pytest.fixture(scope="module")
def pairs():
    """(our decoder, theirs, prompts) a model."""
    found = []
    for seed, eos in MODELS:
        arrays = drive.arrays(seed, eos=eos)
        theirs = oracle.language_of(drive.CONFIG, {f"decoder/{path}": a for path, a in arrays.items()})
        found.append((drive.decoder(arrays), theirs, drive.prompts(seed, 12)))
    return found


def agree(pairs, limit=drive.ROOM, banned=(), **settings):
    """Asserts equal tokens and returns the lengths."""
    g = GenerationConfig(**settings, banned_tokens=banned)
    forced = settings.pop("forced_eos", False)
    settings |= {
        "forced_eos_token_id": drive.EOS if forced else None,
        "bad_words_ids": [list(ids) for ids in banned] or None,
    }
    lengths = []
    for ours, theirs, prompts in pairs:
        mine = [tokens for tokens, _ in drive.generate(ours, prompts, g, limit)]
        assert mine == oracle.generate(theirs, prompts, limit, drive.EOS, **settings)
        lengths += map(len, mine)
    return lengths


@pytest.mark.parametrize("ngram", [0, 2, 4])
def test_greedy(pairs, ngram):
    lengths = agree(pairs, no_repeat_ngram_size=ngram)
    assert len(set(lengths)) > 5


@pytest.mark.parametrize(("beams", "ngram"), [(2, 2), (3, 0), (3, 4), (4, 2), (4, 0)])
def test_beams(pairs, beams, ngram):
    """With every way to stop and every penalty; both limits, for another half each time."""
    lengths = []
    for i, (early, penalty) in enumerate(itertools.product((True, False), (0.5, 1.0, 2.0))):
        lengths += agree(
            pairs,
            (drive.ROOM, 7)[(i + beams + ngram // 2) % 2],
            num_beams=beams,
            no_repeat_ngram_size=ngram,
            early_stopping=early,
            length_penalty=penalty,
        )
    assert len(set(lengths)) > 8


QWEN2 = dataclasses.replace(drive.CONFIG, family="qwen2", window=None, qkv_bias=True)
QWEN3 = dataclasses.replace(drive.CONFIG, family="qwen3", window=None, qk_norm=True, tied=True)


@pytest.mark.parametrize("c", [QWEN2, QWEN3], ids=lambda c: c.family)
def test_other_families_greedily_and_with_beams(c):
    """The head of one of them is tied: its table is looked up for every token that was chosen."""
    found = []
    for seed, eos in MODELS[::2]:
        arrays = drive.arrays(seed, eos=eos, c=c)
        theirs = oracle.language_of(c, {f"decoder/{path}": a for path, a in arrays.items()})
        found.append((drive.decoder(arrays, c), theirs, drive.prompts(seed, 12, c)))
    lengths = [
        agree(found, num_beams=beams, no_repeat_ngram_size=2) for beams in (1, 3)
    ]  # else what is tied repeats itself
    assert all(len(set(row)) > 4 for row in lengths)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize("beams", [1, 3])
def test_repetition_penalty(pairs, beams):
    """One at a time: with a batch, theirs leaves out as many first tokens of an answer as there is padding
    before its prompt.
    """
    plain = {"num_beams": beams, "no_repeat_ngram_size": 4}
    changed = 0
    ours, theirs, prompts = pairs[0]
    for penalty in (1.3, 0.8):
        mine = [
            tokens
            for tokens, _ in drive.generate(
                ours, prompts, GenerationConfig(repetition_penalty=penalty, **plain)
            )
        ]
        for prompt, tokens in zip(prompts[:5], mine, strict=False):
            assert [tokens] == oracle.generate(
                theirs, [prompt], drive.ROOM, drive.EOS, repetition_penalty=penalty, **plain
            )
        changed += mine != [tokens for tokens, _ in drive.generate(ours, prompts, GenerationConfig(**plain))]
    assert changed == 2


@pytest.mark.parametrize("beams", [1, 3])
def test_banned_sequences_and_forced_end(pairs, beams):
    recipe = {"num_beams": beams, "early_stopping": True, "no_repeat_ngram_size": 3, "forced_eos": True}
    for limit in (drive.ROOM, 6, 2, 1):
        agree(pairs, limit, BANNED, **recipe)


def test_a_batch_equals_one_at_a_time(pairs):
    g = GenerationConfig(num_beams=3, no_repeat_ngram_size=4)
    for ours, theirs, prompts in pairs:
        batched = [tokens for tokens, _ in drive.generate(ours, prompts, g)]
        alone = [
            oracle.generate(theirs, [p], drive.ROOM, drive.EOS, num_beams=3, no_repeat_ngram_size=4)[0]
            for p in prompts
        ]
        assert batched == alone


class Published:
    """The recipe of the published README, in PyTorch.

    CLIP, the adapter, embeddings side by side, Hugging Face's beams.
    """

    def __init__(self, config, tokenizer, sharpness, eos):
        self.original, self.tokenizer = torch_models.Original(config, tokenizer), tokenizer
        with torch.no_grad():
            head = self.original.llm.lm_head.weight
            head *= sharpness
            head[tokenizer.eos] *= eos

    def arrays(self, config):
        tables = {
            "image/encoders/0": clip.CLIP.table(config.image.encoders[0]),
            "image/adapter": original.adapter_table(config),
        }
        tables |= {"special": original.SPECIAL_TABLE, "decoder": language_models.table(config.decoder)}
        found = {}
        for part, named in self.original.tensors().items():
            prefix = clip.PREFIX if part == "image/encoders/0" else ""
            named = {prefix + name.removeprefix(clip.PREFIX): t.detach().numpy() for name, t in named.items()}
            found |= from_foreign(named, tables[part], shapes_of(config, part), part, ignore=clip.IGNORED)
        return found

    @torch.no_grad()
    def answer(self, image, question, **settings):
        x, _, _ = self.original.lay_out(image, [(False, question)])
        x = torch.cat([x, self.original.special["BOT"][None]])
        out = self.original.llm.generate(
            inputs_embeds=x[None], attention_mask=torch.ones(1, len(x), dtype=torch.long), **settings
        )[0].tolist()
        return out[: out.index(self.tokenizer.eos) + 1] if self.tokenizer.eos in out else out


QUESTIONS = (
    "What is in the picture?",
    "How many circles are there?",
    "Where is the blue square: left or right?",
    "A",
)


@pytest.mark.parametrize(("sharpness", "eos"), [(3.0, 2.0), pytest.param(8.0, 3.0, marks=pytest.mark.sweep)])
def test_the_published_recipe(tmp_path, sharpness, eos):
    config, tokenizer = tiny.config(), tiny.make_tokenizer(tmp_path)
    theirs = Published(config, tokenizer, sharpness, eos)
    ours = Model(config, theirs.arrays(config), tokenizer)
    eos = tokenizer.eos
    bad = [tokenizer.encode(word) for word in ("\n", "</s>", ":")] + [[tokenizer.encode("\n")[-1]]]
    recipe = {
        "do_sample": False,
        "max_new_tokens": 50,
        "num_beams": 3,
        "early_stopping": True,
        "no_repeat_ngram_size": 4,
        "repetition_penalty": 1.0,
        "remove_invalid_values": True,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "forced_eos_token_id": eos,
        "bad_words_ids": bad,
        "use_cache": True,
    }
    pictures = [None, *(tiny.image(config, i) for i in range(4))]
    asked = [(picture, question) for picture in pictures for question in QUESTIONS]
    requests = [
        Request(
            [{"role": "user", "content": question}],
            images=[] if image is None else [Image.fromarray(image[0])],
        )
        for image, question in asked
    ]
    answers = ours.generate(requests, GenerationConfig.official(), batch_size=8)
    assert [a.tokens for a in answers] == [
        theirs.answer(image, question, **recipe) for image, question in asked
    ]
    assert all(a.tokens[-1] == eos for a in answers) and len({len(a.tokens) for a in answers}) > 5
    assert [a.finish_reason for a in answers] == [
        "length" if len(a.tokens) == 50 else "stop" for a in answers
    ]


def test_greedy_of_the_whole_model(tmp_path):
    config, tokenizer = tiny.config(), tiny.make_tokenizer(tmp_path)
    theirs = Published(config, tokenizer, 4.0, 2.0)
    ours = Model(config, theirs.arrays(config), tokenizer)
    image = tiny.image(config)
    requests = [
        Request([{"role": "user", "content": question}], images=[np.array(image[0])])
        for question in QUESTIONS
    ]
    settings = {
        "do_sample": False,
        "max_new_tokens": 30,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.eos,
    }
    answers = ours.generate(requests, GenerationConfig(max_new_tokens=30))
    assert [a.tokens for a in answers] == [
        theirs.answer(image, question, **settings) for question in QUESTIONS
    ]
