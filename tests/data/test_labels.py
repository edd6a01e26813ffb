"""What is learned of dialogues in the templates of OmniLMM and MiniCPM-V, by the published rules."""

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer as Backend

from omnifusion_jax.batch import INSTEAD
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.describe import render
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.published_templates import TEMPLATES

BOS, EOS = 1, 2
TALKS = [
    ("What is it?", "A red circle."),
    ("What is it?", "A red circle.", "Where is it?", "To the left\nof it."),
    ("What?", "There", "How many?", "two", "And?", "no"),
    ("What is it?", "A red circle.", "Where is it?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text('{"unk_token": "<unk>", "add_bos_token": true}')
    return directory


def sample(folder, template, labels, texts):
    token = {"omnilmm": "<im_patch>", "minicpm-v": "<unk>"}[template]
    c = ModelConfig(layout="template", template=TEMPLATES[template], prompt="", labels=labels)
    c.image.token = token
    turns = tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    layout = Layout(Tokenizer(folder), c, 1000)
    return layout(tiny.dialogue(turns), []), layout


def targets(found):
    """int[n]: of each position the token that it is to predict, -1 where none is."""
    other = np.where(found.kind == INSTEAD, found.index, found.tokens)
    return np.append(np.where(found.weights > 0, other, -1)[1:], -1)


def occurrences(ids, part):
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]


@pytest.mark.parametrize("texts", TALKS)
def test_omnilmm_learns_what_lies_between_its_marks(folder, texts):
    """Tokens after each "\\n<|assistant|>\\n" up to the next "\\n<|user|>\\n", found by ids."""
    found, _ = sample(folder, "omnilmm", "omnilmm", texts)
    ids, backend = found.tokens.tolist(), Backend.from_file(str(folder / "tokenizer.json"))

    def mark(role):  # as it is cut behind an end of sequence
        cut = backend.encode(f"</s>\n<|{role}|>\n", add_special_tokens=False).ids
        return cut[cut.index(EOS) + 1 :]

    expected = np.full(len(ids), -1)
    starts = [i + len(mark("assistant")) for i in occurrences(ids, mark("assistant"))]
    ends = occurrences(ids, mark("user"))
    assert len(starts) == len(texts) // 2
    for start in starts:
        stop = min((end for end in ends if end >= start), default=len(ids))
        expected[start:stop] = ids[start:stop]
    np.testing.assert_array_equal(targets(found), np.append(expected[1:], -1))


@pytest.mark.parametrize("labels", ["ends", "minicpm"])
@pytest.mark.parametrize("texts", TALKS)
def test_minicpm_learns_where_each_answer_ends(folder, texts, labels):
    """The end of sequence follows the last message; behind others its place is another token's."""
    found, _ = sample(folder, "minicpm-v", labels, texts)
    text = "".join(("<用户>", "<AI>")[i % 2] + said for i, said in enumerate(texts))
    cut = Backend.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False)
    answered = [False] * len(cut.ids)
    at = 0
    for i, said in enumerate(texts):
        at += len(("<用户>", "<AI>")[i % 2])
        if i % 2:
            answered = [
                known or (start >= at and stop <= at + len(said))
                for known, (start, stop) in zip(answered, cut.offsets, strict=True)
            ]
        at += len(said)
    ids, context = [BOS, *cut.ids], [False, *answered]
    if len(texts) % 2 == 0:
        ids, context = [*ids, EOS], [*context, True]
    if labels == "minicpm":
        ids, context = ids[1:], context[1:]
    assert found.tokens.tolist() == ids
    expected = np.full(len(ids), -1)
    for i in range(1, len(ids)):
        if context[i]:
            expected[i - 1] = ids[i]
        elif context[i - 1]:
            expected[i - 1] = EOS
    np.testing.assert_array_equal(targets(found), expected)


def test_questions_have_the_beginning_and_no_end(folder):
    turns = (("user", "What?"),)
    for labels in ("turn", "ends", "minicpm"):
        _, layout = sample(folder, "minicpm-v", labels, TALKS[0])
        asked = layout(tiny.dialogue(turns), [], ask=True)
        assert asked.tokens[0] == BOS and asked.tokens[-1] != EOS and not asked.weights.any()


def test_what_is_learned_instead_is_shown(folder):
    found, layout = sample(folder, "minicpm-v", "ends", TALKS[1])
    shown = render(found, layout.tokenizer, (), ("image",))
    assert "[[A red circle.]]" in shown and "(learned as </s>)]]" in shown and shown.endswith("of it.</s>]]")


def test_labels_belong_to_templates():
    with pytest.raises(ConfigError, match=r"model.labels=ends belongs to model\.layout=template"):
        ModelConfig(labels="ends").validate()
    with pytest.raises(ConfigError, match=r"model\.labels is 'other'"):
        ModelConfig(labels="other", layout="template", template="x").validate()
