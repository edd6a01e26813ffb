"""A second kind of media beside pictures: sounds, here lists of numbers, as a modality of one's own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT, Tile, collate
from omnifusion_jax.config import ModelConfig, StreamConfig, adapter
from omnifusion_jax.data.describe import render
from omnifusion_jax.data.dialogues import Dialogue, Media, Request, from_record, from_request, parse
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.modality import NEXT, Modality
from omnifusion_jax.data.pictures import Prepared
from omnifusion_jax.errors import DataError
from omnifusion_jax.evaluation.exact_match import questions
from omnifusion_jax.jobs.requests import request_of
from omnifusion_jax.models.axes import axes
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.tables import ENCODERS, MODALITIES
from omnifusion_jax.training.optimizer import decays

WINDOW, ROWS = 8, 2  # numbers of a tile of sound, and its feature rows


@dataclasses.dataclass(unsafe_hash=True)
class WavesConfig:
    kind: str = "waves"
    width: int = 12
    rows: int = ROWS
    side: int | None = None
    keep_class_token: bool = False

    def validate(self):
        ENCODERS[self.kind]


class Waves(nnx.Module):
    """One linear map from each half of a window to a feature row."""

    def __init__(self, c, *, rngs):
        self.patch = Linear(WINDOW // ROWS, c.width, rngs=rngs)

    def __call__(self, windows, remat="none"):  # [batch, WINDOW]
        return self.patch(windows.reshape(len(windows), ROWS, -1))


@dataclasses.dataclass
class SoundConfig(StreamConfig):
    encoders: tuple[WavesConfig, ...] = (WavesConfig(),)
    adapter: object = dataclasses.field(default_factory=lambda: adapter("linear"))
    token: str = "<sound>"


@dataclasses.dataclass
class HearingConfig(ModelConfig):
    sound: SoundConfig = dataclasses.field(default_factory=SoundConfig)


@dataclasses.dataclass
class SoundProcessor:
    """Cuts a list of numbers into windows, the last of them filled up with zeros."""

    @classmethod
    def of(cls, c, **settings):
        return cls()

    room, positions = 3, 3 * ROWS

    def tile(self, number):
        return Tile(number, ((WINDOW,),), np.float32, ROWS)

    def __call__(self, source):
        if not len(source):
            raise DataError("a sound of no length")
        windows = -(-len(source) // WINDOW)
        filled = np.zeros((windows, WINDOW), np.float32)
        filled.ravel()[: len(source)] = source
        return Prepared((filled,), np.arange(windows * ROWS, dtype=np.int32), windows * ROWS)

    outline = __call__


@pytest.fixture(autouse=True)
def sounds(monkeypatch):
    part = lambda part, where: part.get("sound", NEXT)
    row = Modality("<sound>", ("sound", "sounds"), {"sound": part}, SoundProcessor)
    monkeypatch.setitem(MODALITIES, "sound", row)
    monkeypatch.setitem(ENCODERS, "waves", Waves)


PARTED = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
PARTED += "{{ p.text if p.type == 'text' else '<' + p.type + '>' }}{% endfor %}{% endfor %}"
PARTED += "{{ '[assistant]' if add_generation_prompt }}"
STYLES = {
    "prefix": {"layout": "omnifusion"},
    "mark": {"layout": "omnifusion", "image_place": "mark"},
    "words": {"layout": "text", "image_place": "mark"},
    "template": {"layout": "template", "template": PARTED, "prompt": ""},
}
SHORT, LONG = [1.0, 2.0, 3.0], [float(i) for i in range(10, 21)]  # of one window and of two
PICTURE = np.full((24, 24, 3), 99, np.uint8)
IMAGES, FIRST, SECOND = (
    [("image", i) for i in range(9)],
    [("sound", i) for i in range(2)],
    [("sound", i) for i in range(2, 6)],
)


def model(style="prefix") -> ModelConfig:
    c = tiny.config()
    c = HearingConfig(image=c.image, decoder=c.decoder, prompt=tiny.PROMPT)
    return dataclasses.replace(c, **STYLES[style])


def prepared(tokenizer, style="prefix"):
    return Prepare.of(tokenizer, model(style), 256)


RECORD = {
    "image": PICTURE,
    "sounds": [SHORT, LONG],
    "conversations": [
        {"from": "human", "value": "<sound>\nIs it <image> or\n<sound>"},
        {"from": "gpt", "value": "A cat."},
    ],
}


ASKED = {**RECORD, "conversations": RECORD["conversations"][:1]}


def spelled(layout, sample):
    names = {
        TEXT: lambda token, i: int(token),
        SPECIAL: lambda token, i: layout.vectors[i],
        FEATURE: lambda token, i: ("image", int(i)),
        FEATURE + 1: lambda token, i: ("sound", int(i)),
    }
    return [names[kind](token, i) for token, kind, i in zip(*sample[:3], strict=True)]


def test_a_record_lists_both_and_marks_say_their_order():
    found = parse(RECORD, "here")
    assert [media.stream for media in found.media] == ["sound", "image", "sound"]
    assert found.of("sound") == (SHORT, LONG) and found.images[0] is PICTURE


def test_parts_of_both_kinds():
    content = [{"type": "sound"}, {"type": "text", "text": "or"}, {"type": "image"}, {"type": "sound"}]
    request = Request([{"role": "user", "content": content}], [PICTURE], media={"sound": [SHORT, LONG]})
    found = from_request(request)
    assert found.turns == (("user", "<sound>\nor\n<image>\n<sound>"),) and found.parted
    assert [media.stream for media in found.media] == ["sound", "image", "sound"]
    assert found.of("sound") == (SHORT, LONG)
    short = Request(request.messages, [PICTURE], media={"sound": [SHORT]})
    with pytest.raises(DataError, match=r'2 "sound" parts name no file, and "sounds" lists 1\. Each'):
        from_request(short)


@pytest.mark.parametrize("stream", ["image", "smell"])
def test_a_request_names_other_streams_only(stream):
    request = Request([{"role": "user", "content": "What?"}], media={stream: [SHORT]})
    with pytest.raises(DataError, match=f"media hold '{stream}'; known are sound, and pictures belong in im"):
        from_request(request)


@pytest.mark.parametrize("style", STYLES)
def test_where_each_stands(tokenizer, style):
    prepare, e = prepared(tokenizer, style), tokenizer.encode
    enclosed = lambda rows: ["soi", *rows, "eoi"]
    sound, image, other = map(enclosed, (FIRST, IMAGES, SECOND))
    if style == "prefix":  # stream by stream
        expected = [*e(tiny.PROMPT), *image, *sound, *other, "user", *e("Is it  or"), "bot"]
    elif style == "mark":
        expected = [*e(tiny.PROMPT), "user", *sound, *e("Is it "), *image, *e(" or"), *other, "bot"]
    elif style == "words":
        words = e("User:"), e("Is it "), e(" or"), e("AI:")
        expected = [*e(tiny.PROMPT), *words[0], *sound, *words[1], *image, *words[2], *other, *words[3]]
    else:
        tokens = {tokenizer.mark(f"<{name}>"): name for name in ("image", "sound")}
        rows = iter((FIRST, IMAGES, SECOND))
        written = e("[user]<sound>Is it <image> or<sound>[assistant]")
        expected = [slot for token in written for slot in (next(rows) if token in tokens else [token])]
    sample = prepare(parse(ASKED, "here"), ask=True)
    assert spelled(prepare.layout, sample) == expected
    assert (sample.items, sample.media_positions) == (3, 9 + 2 + 4)
    (windows,), (pixels,) = sample.media["sound"], sample.media["image"]
    assert windows.tolist() == [[*SHORT, 0, 0, 0, 0, 0], LONG[:8], [*LONG[8:], 0, 0, 0, 0, 0]]
    assert pixels.shape == (1, 24, 24, 3)


@pytest.mark.parametrize("style", STYLES)
def test_a_request_shows_them_as_training_did(tokenizer, style):
    prepare = prepared(tokenizer, style)
    record = parse(RECORD, "here")
    messages = json.loads(json.dumps(prepare.layout.messages(record)[:-1]))
    sample = prepare(from_request(record.request(messages)), ask=True)
    assert spelled(prepare.layout, sample) == spelled(prepare.layout, prepare(parse(ASKED, ""), ask=True))


def test_text_without_marks_shows_all_of_them_first(tokenizer):
    prepare, e = prepared(tokenizer, "mark"), tokenizer.encode
    beside = Request([{"role": "user", "content": "What?"}], [PICTURE], media={"sound": [SHORT]})
    rows = ["soi", *IMAGES, "eoi", "soi", *FIRST, "eoi"]
    expected = [*e(tiny.PROMPT), "user", *rows, *e("What?"), "bot"]
    assert spelled(prepare.layout, prepare(from_request(beside), ask=True)) == expected


def test_marks_are_counted_by_stream(tokenizer):
    turns = (("human", "<sound>\nWhat?"), ("gpt", "A cat."))
    with pytest.raises(DataError, match='the text has 1 <sound> mark but "sound" lists 0 files'):
        prepared(tokenizer)(Dialogue("here", turns, (), marked=True))


def test_the_order_of_a_source_of_ones_own_must_be_that_of_the_marks(tokenizer):
    turns = (("human", "<sound>\n<image>\nWhat?"), ("gpt", "A cat."))
    media = (Media("image", PICTURE), Media("sound", SHORT))
    for style in ("mark", "template"):
        with pytest.raises(DataError, match="here: the text marks sound, image, the media are image, sound"):
            prepared(tokenizer, style)(Dialogue("here", turns, media, marked=True))
    assert prepared(tokenizer)(Dialogue("here", turns, media, marked=True)).items == 2


def test_questions_and_lines_of_requests_carry_both(tokenizer, tmp_path):
    turns = [("<sound>What?", "A dog."), ("And <image> <sound>?", "A cat.")]
    talk = [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]
    record = parse({"image": "a.png", "sounds": ["s.wav", "t.wav"], "conversations": talk}, "here")
    layout = prepared(tokenizer, "mark").layout
    asked = [(request.images, request.media) for request, *_ in questions(record, layout)]
    assert asked == [([], {"sound": ["s.wav"]}), (["a.png"], {"sound": ["s.wav", "t.wav"]})]
    line = {"image": "a.png", "sounds": ["s.wav", "t.wav"], "conversations": talk}
    request = request_of(from_record(line, "in.jsonl:1", tmp_path), "1", layout)
    assert request.images == [tmp_path / "a.png"]
    assert request.media == {"sound": [tmp_path / "s.wav", tmp_path / "t.wav"]}


def test_described(tokenizer):
    prepare = prepared(tokenizer)
    sample = prepare(parse(RECORD, "here"))
    words = render(sample, tokenizer, prepare.layout.vectors, prepare.layout.streams)
    sounds = "<SOI> <2 sound features> <EOI> <SOI> <4 sound features> <EOI>"
    assert f"<SOI> <9 image features> <EOI> {sounds}" in words


def test_the_model_reads_both_and_learns_from_both(tokenizer):
    """Rows by hand among the text, and a gradient for every parameter of both streams."""
    c = model()
    c.validate()
    prepare = prepared(tokenizer)
    arrays = tiny.arrays(c)
    module = abstract(c)
    silent = {"image": PICTURE, "conversations": [{**RECORD["conversations"][0], "value": "<image>\nWhat?"}]}
    samples = [prepare(parse(ASKED, "a"), ask=True), prepare(parse(silent, "b"), ask=True)]
    batch = collate(samples, max(len(s.tokens) for s in samples), prepare.tiles, pools=1)
    x = np.asarray(jax.jit(lambda arrays: nnx.with_parameters(module, arrays).embed(batch))(arrays))
    rows = samples[0].media["sound"][0].reshape(-1, ROWS, WINDOW // ROWS)
    for part in ("encoders/0/patch", "adapter/linear"):
        rows = rows @ arrays[f"sound/{part}/kernel"] + arrays[f"sound/{part}/bias"]
    here = batch.kind == FEATURE + 1
    np.testing.assert_allclose(x[here], rows.reshape(-1, rows.shape[-1]), rtol=1e-5, atol=1e-6)
    assert here[0].sum() == 6 and not here[1].any()
    loss = lambda arrays: jnp.square(nnx.with_parameters(module, arrays)(batch)).mean()
    gradient = jax.jit(jax.grad(loss))(arrays)
    paths = [path for path in gradient if path.startswith(("sound/", "image/adapter"))]
    assert {"sound/encoders/0/patch/kernel", "sound/adapter/linear/bias"} < set(paths)
    for path in paths:
        assert float(jnp.abs(gradient[path]).max()) > 0, path
    assert axes("sound/adapter/linear/kernel") == ["_", "width"]
    assert decays("sound/encoders/0/patch/kernel") and not decays("sound/adapter/linear/bias")
