"""Prompts by chat template: published texts, Hugging Face's ids for them, what is learned, and refusals."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from omnifusion_jax.batch import FEATURE, TEXT
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.chat_template import Template
from omnifusion_jax.data.dialogues import Dialogue, parse
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.published_templates import TEMPLATES

BOS, EOS = 1, 2
OMNILMM = (  # said before any dialogue
    "<|system|>\nYou are an artificial intelligence assistant, which gives helpful, detailed, and polite "
    "answers to the human's questions.</s>\n"
)
TOKENS = {"omnilmm": "<im_patch>", "minicpm-v": "<unk>"}  # that a template writes for a picture; or <image>
PROMPTS = {
    "llava-1.5": (
        "USER: <image>\nWhat? ASSISTANT:",
        "USER: What? ASSISTANT: A cat.</s>USER: <image>\nWhy? ASSISTANT:",
    ),
    "llava-next-mistral": (
        "[INST] <image>\nWhat? [/INST]",
        "[INST] What? [/INST] A cat.</s>[INST] <image>\nWhy? [/INST]",
    ),
    "omnilmm": (
        f"{OMNILMM}<|user|>\n<im_start><im_patch><im_end>\nWhat?</s>\n<|assistant|>\n",
        f"{OMNILMM}<|user|>\nWhat?</s>\n<|assistant|>\nA cat.</s>\n"
        "<|user|>\n<im_start><im_patch><im_end>\nWhy?</s>\n<|assistant|>\n",
    ),
    "minicpm-v": (
        "<用户><image><unk></image>\nWhat?<AI>",
        "<用户>What?<AI>A cat.<用户><image><unk></image>\nWhy?<AI>",
    ),
}
ONE = ("<image>What?",)  # a mark stands before the text as a layout reads it
THREE = ("What?", "A cat.", "<image>Why?")
SYSTEM = "<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] <image>\nWhat? [/INST]"
MARKED = Dialogue("b", (("user", "What?"), ("assistant", "A cat."), ("user", "<image>\nWhy?")))
# of a language model: content is a string
LANGUAGE = (
    "{% for m in messages %}{{ bos_token if loop.first }}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{{ '<bot>' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer whose tokenizer.json adds the beginning of the sequence, as Llama's does."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(directory)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def tokenizer(folder):
    return Tokenizer(folder)


def layout(tokenizer, template="llava-1.5", **settings):
    return tiny.layout(
        tokenizer, 512, 32, layout="template", template=TEMPLATES.get(template, template), **settings
    )


def dialogue(*texts, marked=False):
    return Dialogue(
        "chat.json[7]",
        tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts)),
        marked=marked,
    )


def pictures(n):
    return [tiny.picture(np.zeros((32, 32, 3), np.uint8))] * n


def laid(lay, talk, n, ask=False):
    """The Sample of a dialogue with `n` pictures."""
    return lay(dataclasses.replace(talk, media=tiny.shown(*["p.png"] * n)), pictures(n), ask=ask)


def turns(*texts):
    return [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def answers(tokenizer, sample):
    """Each run of targets, piece by piece as the vocabulary has them, spaces before them too."""
    edges = np.flatnonzero(np.diff(np.pad(sample.weights > 0, 1))).reshape(-1, 2)
    return ["".join(map(tokenizer.backend.id_to_token, sample.tokens[a:b].tolist())) for a, b in edges]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_published_prompts(tokenizer, name):
    one, three = PROMPTS[name]
    template = Template(TEMPLATES[name], {"image": TOKENS.get(name, "<image>")}, tokenizer)
    assert template.render(turns(*ONE), template.form, True, "") == one
    assert template.render(turns(*THREE), template.form, True, "") == three


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_hugging_face(folder, tokenizer, name):
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    token = TOKENS.get(name, "<image>")
    theirs.add_special_tokens({"additional_special_tokens": [token]})
    template = Template(TEMPLATES[name], {"image": token}, tokenizer)
    for text, said in zip(PROMPTS[name], (ONE, THREE), strict=True):
        ids, weights, _ = template(turns(*said), True, "")
        assert ids.tolist() == theirs(text).input_ids
        assert ids[0] == BOS and np.isin(ids, list(template.ids)).sum() == 1 and not weights.any()
        assert ids.dtype == np.int32 and weights.dtype == np.float32


def test_features_stand_where_the_template_marks_the_picture(tokenizer):
    lay = layout(tokenizer)
    for talk, shown in (
        (dialogue("What?"), 1),
        (dialogue("What?", "A cat.", "<image>\nWhy?"), 1),
        (dialogue("What?"), 0),
    ):
        sample = laid(lay, talk, shown, ask=True)
        here = np.flatnonzero(sample.kind == FEATURE)
        assert len(here) == 4 * shown and sample.index[here].tolist() == list(range(4 * shown))
        text = tokenizer.backend.decode(
            sample.tokens[sample.kind == TEXT].tolist(), skip_special_tokens=False
        )
        assert text.startswith("<s>") and "ASSISTANT:" in text and "<image>" not in text
        if shown:
            assert here.tolist() == list(range(here[0], here[0] + 4))
            before = tokenizer.backend.decode(sample.tokens[: here[0]].tolist(), skip_special_tokens=False)
            assert before.rstrip().endswith("USER:")


def test_targets_are_the_answers_and_their_end(tokenizer):
    for name in ("llava-1.5", "llava-next-mistral"):
        sample = laid(layout(tokenizer, name), dialogue("What?", "A cat.", "Why?", "It is red."), 1)
        assert answers(tokenizer, sample) == ["\u2581A\u2581cat.</s>", "\u2581It\u2581is\u2581red.</s>"]
        assert (sample.tokens[sample.weights > 0] == EOS).sum() == 2


def test_targets_after_a_picture_are_not_moved_by_it(tokenizer):
    """The picture stands between two answers: its four features take the place of one token."""
    lay = layout(tokenizer)
    plain, shown = (
        lay(dialogue("What?", "A cat.", "Why?", "It is red."), []),
        dialogue("What?", "A cat.", "<image>\nWhy?", "It is red."),
    )
    sample = laid(lay, shown, 1)
    assert (
        answers(tokenizer, sample)
        == answers(tokenizer, plain)
        == ["\u2581A\u2581cat.</s>", "\u2581It\u2581is\u2581red.</s>"]
    )
    features = np.flatnonzero(sample.kind == FEATURE)
    ends = np.flatnonzero(sample.tokens == EOS)
    assert ends[0] < features[0] and features[-1] < ends[1] == len(sample.tokens) - 1


def test_a_system_turn_stands_where_the_template_puts_it(tokenizer):
    talk = Dialogue("chat.json[7]", (("system", "Be brief."), ("user", "What?")))
    for name, text in (
        ("llava-1.5", "Be brief. USER: <image>\nWhat? ASSISTANT:"),
        ("llava-next-mistral", SYSTEM),
    ):
        lay = layout(tokenizer, name)
        shown = lay.read(lay.with_marks(dataclasses.replace(talk, media=tiny.shown("p.png"))))
        assert lay.template.render(shown, lay.template.form, True, "") == text
        sample = laid(lay, talk, 1, ask=True)
        before = tokenizer.backend.decode(sample.tokens[: np.flatnonzero(sample.kind == FEATURE)[0]].tolist())
        assert "Be brief." in before and "What?" not in before  # the picture belongs to the first question
    taught = layout(tokenizer)(Dialogue("here", (*talk.turns, ("assistant", "A cat."))), [])
    assert answers(tokenizer, taught) == ["\u2581A\u2581cat.</s>"]


def test_a_system_turn_that_the_template_would_lose_is_refused(tokenizer):
    deaf = TEMPLATES["llava-1.5"].replace(
        "for message in messages", "for message in messages if message['role'] != 'system'"
    )
    talk = Dialogue("chat.json[7]", (("system", "Be brief."), ("user", "What?")))
    with pytest.raises(DataError, match=r"chat.json\[7\]: the chat template leaves the system's turn out"):
        layout(tokenizer, deaf)(talk, [], ask=True)


def test_a_system_turn_may_lose_the_white_space_around_it(tokenizer):
    """As in Llama-3's template, which trims what every turn says."""
    trimming = LANGUAGE.replace("m['content']", "m['content'] | trim")
    talk = Dialogue("chat.json[7]", (("system", " Be brief.\n"), ("user", "What?")))
    sample = layout(tokenizer, trimming)(talk, [], ask=True)
    assert "Be brief." in tokenizer.backend.decode(sample.tokens.tolist())


def test_a_picture_stands_where_the_parts_of_a_turn_show_it(tokenizer):
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
    ]
    lay, picture = layout(tokenizer), np.zeros((32, 32, 3), np.uint8)
    parts, marks = (
        laid(lay, talk, 1, ask=True)
        for talk in (parse({"messages": messages, "images": [picture]}, "a"), MARKED)
    )
    assert [a.tolist() for a in parts[:4]] == [a.tolist() for a in marks[:4]]


def test_the_beginning_of_the_sequence_comes_once(tmp_path, tokenizer):
    assert layout(tokenizer)(dialogue("What?"), [], ask=True).tokens[:2].tolist() != [BOS, BOS]
    own = layout(tokenizer, LANGUAGE)(dialogue("What?"), [], ask=True)
    assert own.tokens[0] == BOS and (own.tokens == BOS).sum() == 1
    tiny.make_tokenizer(tmp_path)  # whose tokenizer.json adds none
    assert layout(Tokenizer(tmp_path))(dialogue("What?"), [], ask=True).tokens[0] != BOS
    digests = set()
    for says in (True, False):
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"add_bos_token": says}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert (layout(Tokenizer(tmp_path))(dialogue("What?"), [], ask=True).tokens[0] == BOS) == says
        digests.add(Tokenizer(tmp_path).digest)
    assert len(digests) == 2  # answers of the one are not gone on with by the other


def test_a_template_of_a_language_model_gets_a_string(tokenizer):
    template = Template(LANGUAGE, {"image": "<image>"}, tokenizer)
    assert template.render(turns(*ONE), template.form, True, "") == "<s><user><image>\nWhat?<bot>"


def test_the_image_token_may_have_another_name_and_an_id_of_its_own(tokenizer):
    source = TEMPLATES["llava-1.5"].replace("<image>", "<pic>")
    assert Template(source, {"image": "<pic>"}, tokenizer).ids == {tiny.VOCAB: "image"}  # after all others
    assert tokenizer.mark("</s>") == EOS  # one that is there keeps its id
    c = tiny.model(32, layout="template", template=source)
    c.image.token = "<pic>"
    sample = laid(Layout(tokenizer, c, 512), dialogue("<image>\nWhat?", marked=True), 1, ask=True)
    assert (sample.kind == FEATURE).sum() == 4 and sample.tokens.max() < tiny.VOCAB


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}",  # not closed
        "{{ raise_exception('never') }}",
        "no text at all",
        "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",  # no picture
        "<image>{{ messages[0]['content'] }}",  # writes out the parts
        "{{ messages.nothing.there }}",
        "{{ 1 + messages }}",  # a TypeError
        "{{ 'text'.index('<image>') }}",  # a ValueError
    ],
)
def test_a_template_that_says_nothing_of_use_is_refused(tokenizer, source):
    with pytest.raises(
        DataError,
        match=r"the chat template puts neither '<image>' nor the text of a turn .* correct model.template",
    ):
        layout(tokenizer, source)


def test_the_cause_is_named_where_it_cannot_be_rendered(tokenizer):
    with pytest.raises(DataError, match=r"where they belong \(a question: .*Unexpected end of template"):
        layout(tokenizer, "{% for message in messages %}")


def test_dialogues_that_the_template_cannot_show(tokenizer):
    picky = (
        "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
        + TEMPLATES["llava-1.5"]
    )
    with pytest.raises(
        DataError,
        match=r"chat.json\[7\]: the chat template cannot render this dialogue \(one question only\)",
    ):
        layout(tokenizer, picky)(dialogue("What?", "A cat.", "Why?"), [], ask=True)
    forgetful = "{% set messages = messages[-2:] %}" + TEMPLATES["llava-1.5"]
    with pytest.raises(
        DataError, match="changes earlier turns when another follows; it cannot be trained on"
    ):
        layout(tokenizer, forgetful)(dialogue("What?", "A cat.", "Why?", "It is red."), [])
    rewriting = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}{% endfor %}"
    )
    rewriting += "{{ '<assistant>' if add_generation_prompt }}"
    with pytest.raises(DataError, match="changes earlier turns when another follows"):
        layout(tokenizer, rewriting)(dialogue("What?", "A cat.", "Why?", "It is red."), [])
    first_only = TEMPLATES["llava-1.5"].replace(
        "if part['type'] == 'image'", "if part['type'] == 'image' and loop.index < 2 and not seen"
    )
    first_only = first_only.replace(
        "{%- for message in messages -%}", "{%- for message in messages -%}{%- set seen = not loop.first -%}"
    )
    with pytest.raises(DataError, match="the chat template shows no media, the dialogue has 1 x image"):
        laid(layout(tokenizer, first_only), dialogue("What?", "A cat.", "<image>\nWhy?"), 1, ask=True)


def test_the_layout_and_its_template_belong_together():
    for settings in ({"layout": "template"}, {"template": "x"}):
        with pytest.raises(ConfigError, match=r"model.template belongs to model.layout=template"):
            ModelConfig(**settings).validate()


def test_text_between_the_slices_of_a_picture(tokenizer):
    """A line for each row of slices; a token for the whole picture and for each slice."""
    template = Template(TEMPLATES["minicpm-v"], {"image": "<unk>"}, tokenizer)
    one = "<image><unk></image>"
    said = turns("<image>What?", "A cat.", "<image>Why <image> ?")
    found = template.render(said, template.form, True, "", [(0, 0), (2, 3), (1, 2)])
    sliced = f"{one}<slice>{one}{one}{one}\n{one}{one}{one}</slice>"
    after = f"{one}<slice>{one}{one}</slice>"
    assert found == f"<用户>{one}\nWhat?<AI>A cat.<用户>{sliced}\nWhy {after} ?<AI>"
    assert template(said, True, "", [(0, 0), (2, 3), (1, 2)]).ids.tolist().count(0) == 1 + 7 + 3
