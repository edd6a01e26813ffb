"""Any combination of options against Hugging Face's `generate`, token by token."""

import drive
import oracle
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.options import Sizes

pytestmark = pytest.mark.filterwarnings("ignore:Passing `")  # that the prompt is not seen is what is wanted

TEXTS = ["<unk>", "<s>", "</s>", *"abcdef", "ab", "bc", "abc", "ca", "de", "ef", "fa", "aa", "bb", "cab"]
TEXTS += ["\u044f", "\u044fb", "\n", " a", " "]
SIZES = Sizes(
    len(TEXTS), drive.ROOM, beams=4, ends=4, bans=4, ban_length=4, stop_kinds=32, stop_states=16, likeliest=4
)
TOGETHER = 3  # requests in a batch
FILL = 99  # in theirs, after the end of an answer
# What theirs gives to a text that is none: one of a beam before there were so many, or of a token that is not
# allowed. Which of these it returns hangs on how it sorts what is equal.
NONE = -1e5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.Unigram([(text, -1.0) for text in TEXTS], unk_id=0))
    backend.add_special_tokens(TEXTS[:3])
    backend.decoder = decoders.Fuse()
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def made(arrays, seed):
    """(our decoder, theirs, prompts)."""
    theirs = oracle.language_of(drive.CONFIG, {f"decoder/{path}": a for path, a in arrays.items()})
    return drive.decoder(arrays), theirs, drive.prompts(seed, 8)


@pytest.fixture(scope="module")
def pair():
    return made(drive.arrays(0, eos=1.3), 0)


def some(*ids, most=3):
    return st.lists(st.sampled_from(ids), max_size=most, unique=True).map(tuple)


@st.composite
def generations(draw):
    """A GenerationConfig that asks for any of the options that change which tokens are the best."""
    limit, beams = draw(st.integers(1, drive.ROOM)), draw(st.integers(1, 4))
    chosen = {
        "max_new_tokens": limit,
        "min_new_tokens": draw(st.sampled_from([0, 0, 1, 5, 12])),
        "num_beams": beams,
        "num_return_sequences": draw(st.integers(1, beams)),
        "early_stopping": draw(st.sampled_from([True, False, "never"])),
        "length_penalty": draw(st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 0, 2, 3])),
        "banned_tokens": draw(some((5,), (7, 8), (9, 9, 9), (11, 3))),
        "suppress_tokens": draw(some(4, 10, 13)),
        "begin_suppress_tokens": draw(some(drive.EOS, 6, 12)),
        "forced_eos_token_id": draw(st.sampled_from([None, None, drive.EOS, 7])),
        "stop_token_ids": draw(some(14, 15)),
        "stop_strings": draw(some("ca", "\u044fb", "b a", "fab", "aaa", "\n")),
        "likeliest": draw(st.integers(0, 4)),
    }
    chosen["min_new_tokens"] = min(chosen["min_new_tokens"], limit)
    return GenerationConfig(**chosen)


# What differs in name or in what stands for "off"
NAMES = {
    "banned_tokens": ("bad_words_ids", lambda ids: [list(row) for row in ids] or None),
    "suppress_tokens": ("suppress_tokens", lambda ids: list(ids) or None),
    "begin_suppress_tokens": ("begin_suppress_tokens", lambda ids: list(ids) or None),
    "stop_token_ids": ("eos_token_id", lambda ids: [drive.EOS, *ids]),
    "stop_strings": ("stop_strings", lambda strings: list(strings) or None),
}
SAME = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "num_return_sequences",
    "early_stopping",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "forced_eos_token_id",
)


@torch.no_grad()
def theirs(model, tokenizer, prompt, g):
    """(tokens of each answer, the model's log probabilities [steps, vocab] if there are no beams).

    There is no answer when at some step no token is allowed.
    """
    asked = {name: getattr(g, name) for name in SAME}
    asked |= {name: change(getattr(g, ours)) for ours, (name, change) in NAMES.items()}
    out = model.generate(
        inputs_embeds=torch.tensor(prompt)[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        pad_token_id=FILL,
        remove_invalid_values=True,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend),
        **asked,
    )
    answers = [[token for token in row if token != FILL] for row in out.sequences.tolist()]
    scores = [min(step.max().item() for step in out.scores)] if g.num_beams == 1 else out.sequences_scores
    found = [tokens for tokens, score in zip(answers, scores, strict=True) if tokens and score > NONE]
    return found, torch.stack(out.logits).log_softmax(-1)[:, 0]


def agree(pair, tokenizer, asked, start):
    """Asserts equal answers to some prompts; returns ours."""
    ours, model, prompts = pair
    prompts = [prompts[(start + i) % len(prompts)] for i in range(TOGETHER)]
    found = drive.answers(ours, prompts, asked, tokenizer, SIZES)
    for prompt, g, answer in zip(prompts, asked, found, strict=True):
        expected, logprobs = theirs(model, tokenizer, prompt, g)
        if answer is None:
            assert not expected
            continue
        assert [answer.tokens, *(other.tokens for other in answer.others)] == expected
        if g.num_beams == 1:
            told = logprobs[torch.arange(len(answer.tokens)), answer.tokens]
            torch.testing.assert_close(torch.tensor(answer.logprobs), told, atol=1e-4, rtol=1e-4)
            best = logprobs.topk(g.likeliest)
            assert [[token for token, _ in step] for step in answer.likeliest] == (
                best.indices.tolist() if g.likeliest else []
            )
    return found


together = st.tuples(*[generations()] * TOGETHER)


@settings(max_examples=25, derandomize=True)
@given(together, st.integers(0, 7))
def test_combinations(pair, tokenizer, asked, start):
    """Three requests in a batch, each with options of its own."""
    agree(pair, tokenizer, asked, start)


@pytest.mark.sweep
@settings(max_examples=200)
@given(together, st.integers(0, 7))
def test_many_combinations(pair, tokenizer, asked, start):
    agree(pair, tokenizer, asked, start)


def test_never_with_a_price_for_length(tokenizer):
    """The last of these searches ends too early if it judges its beams at the limit, not at their length."""
    asked = {"max_new_tokens": drive.ROOM, "num_beams": 3, "num_return_sequences": 3, "length_penalty": -1.0}
    agree(
        made(drive.arrays(0, sharpness=2.0, eos=1.5), 2),
        tokenizer,
        [GenerationConfig(**asked, early_stopping="never")] * TOGETHER,
        start=5,
    )


def test_a_search_with_fewer_answers_than_beams(pair, tokenizer):
    """Two tokens are left for an answer of one; a place without an answer is none."""
    others = tuple(i for i in range(len(TEXTS)) if i not in (5, 9))
    g = GenerationConfig(max_new_tokens=1, num_beams=3, num_return_sequences=3, suppress_tokens=others)
    assert {len(answer.others) for answer in agree(pair, tokenizer, [g] * TOGETHER, start=0)} == {1}


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_the_first_token_is_forced(pair, tokenizer, settings):
    """Theirs does so after a prompt of a single token only; the beginning is then what follows."""
    ours, model, _ = pair
    asked = {**settings, "max_new_tokens": 9, "begin_suppress_tokens": (5, 6, 7, 8), "forced_bos_token_id": 4}
    prompt = model.get_input_embeddings().weight[9:10].detach().numpy()
    answer = drive.answers(ours, [prompt], [GenerationConfig(**asked)], tokenizer, SIZES)[0]
    out = model.generate(
        torch.tensor([[9]]),
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        do_sample=False,
        pad_token_id=FILL,
        eos_token_id=drive.EOS,
        **asked | {"begin_suppress_tokens": [5, 6, 7, 8]},
    )
    expected = [[token for token in row[1:] if token != FILL] for row in out.tolist()]
    assert [a.tokens for a in (answer, *answer.others)] == expected
    assert all(tokens[0] == 4 and tokens[1] not in (5, 6, 7, 8) for tokens in expected)
