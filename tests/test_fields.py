"""Fields as they are typed on a command line: what text becomes, what is refused, what a field means."""

import dataclasses

import pytest

from omnifusion_jax.config import (
    EncoderConfig,
    GenerationConfig,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    adapter,
)
from omnifusion_jax.fields import fields, nearest, read, strays, values
from omnifusion_jax.tables import ADAPTERS


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("-1", int, -1),
        ("3", float, 3.0),
        ("1e-3", float, 0.001),
        ("None", float | None, None),
        ("2", float | None, 2.0),
        ("None", int | None, None),
        ("4096", int | None, 4096),
        ("None", str | None, None),
        ("", str | None, None),
        ("runs/x", str | None, "runs/x"),
        ("", str, ""),
        ("12", str, "12"),
        ("none", str, "none"),
        ("true", bool, True),
        ("False", bool, False),
        ("0", bool, False),
        ("[]", tuple[str, ...], ()),
        ('["\\n", ":"]', tuple[str, ...], ("\n", ":")),
        ("((1, 2), [3])", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ("(0.5, 1, 0)", tuple[float, float, float], (0.5, 1, 0)),
        (
            '[["image/adapter/.*", 1], ["decoder/.*", None]]',
            tuple[tuple[str, float | None], ...],
            (("image/adapter/.*", 1), ("decoder/.*", None)),
        ),
        ("(1, 'a')", tuple, (1, "a")),
        ("{'decoder': 'a/b'}", dict[str, str], {"decoder": "a/b"}),
        ("{}", dict[str, str], {}),
        ("None", EncoderConfig | None, None),
        ("build", EncoderConfig | None, "build"),
    ],
)
def test_text_becomes_a_value_of_its_type(text, kind, value):
    assert read(text, kind) == value and type(read(text, kind)) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("abc", int, "a whole number is expected"),
        ("2.5", int, "a whole number is expected"),
        ("", int, "a whole number is expected"),
        ("None", int, "a whole number is expected"),
        ("", int | None, "a whole number or None is expected"),
        ("2.5", int | None, "a whole number or None is expected"),
        ("none", float | None, "a number or None is expected"),
        ("None", float, "a number is expected"),
        ("None", bool, "true or false is expected"),
        ("maybe", bool, "true or false is expected"),
        ("None", str, "text is expected"),
        ("abc", tuple[str, ...], "a list like ['text'] is expected"),
        ("[1]", tuple[str, ...], "a list like ['text'] is expected"),
        ("None", tuple[str, ...], "a list like ['text'] is expected"),
        ("5", tuple[str, ...], "a list like ['text'] is expected"),
        ("[True]", tuple[int, ...], "a list like [1] is expected"),
        ("(1, 2)", tuple[float, float, float], r"a list like [0.5, 0.5, 0.5] is expected"),
        ("[['a', 'b']]", tuple[tuple[str, float | None], ...], "a list like [['text', 0.5]] is expected"),
        ("[1, 2", tuple, "a list like [1, 2] is expected"),
        ("a/b", dict[str, str], "text like {'name': 'text'} is expected"),
        ("{'decoder': 1}", dict[str, str], "text like {'name': 'text'} is expected"),
        ("built", EncoderConfig | None, "None or build is expected"),
    ],
)
def test_other_types_are_refused(text, kind, expected):
    with pytest.raises(ValueError) as caught:
        read(text, kind)
    assert str(caught.value) == expected


@pytest.mark.parametrize("cls", [TrainConfig, GenerationConfig, MeshConfig])
def test_every_field_has_a_meaning(cls):
    assert [path for path, field in fields(cls()).items() if not field.meaning] == []


@pytest.mark.parametrize("kind", ADAPTERS.names())
def test_every_field_of_every_adapter_has_a_meaning(kind):
    found = fields(adapter(kind))
    assert {"kind", "init"} <= set(found) and [
        path for path, field in found.items() if not field.meaning
    ] == []
    assert found["kind"].meaning.startswith("a row of tables.ADAPTERS")  # though each has another default


def test_a_meaning_is_the_comment_beside_or_above():
    known = fields(TrainConfig())
    assert known["optimizer.clip"].meaning == "largest global gradient norm; None: no clipping"
    assert known["optimizer.clip"].kind == float | None
    assert known["train_parts"].meaning.startswith(
        "rows (regex, learning-rate factor or None)"
    )  # in the line above
    assert known["compute_dtype"].meaning.startswith(
        "or float32"
    )  # which a field with a comment above follows
    assert {
        "model.decoder.rope_scaling.factor",
        "model.decoder.rope_scaling",
        "model.image.encoders.0.layers",
    } <= set(known)
    assert not {
        "model.decoder",
        "model.image.encoders",
        "model.image.encoders.0",
        "model.image.encoders.1.layers",
    } & set(known)


def test_fields_are_those_of_the_object():
    """Of an adapter those of its kind; of encoders as many as there are."""
    known = fields(ModelConfig(image=ImageConfig((EncoderConfig(), EncoderConfig()), adapter("sum"))))
    assert {"image.encoders.1.layers", "image.adapter.align", "image.adapter.width"} <= set(known)
    assert known["image.adapter.width"].kind == int | None and "image.adapter.heads" not in known


@dataclasses.dataclass
class Base:
    a: int = 1  # one
    # first line,
    # second line
    b: str = "# no comment"  # and what stands beside

    c: tuple[int, ...] = (
        1,  # in the
        2,
    )  # middle


@dataclasses.dataclass
class Derived(Base):
    d: "int | None" = None  # of its own
    a: int = 2  # another one

    def method(self):
        e: int = 3  # no field
        return e


def test_meanings_of_several_lines_and_of_a_base_class():
    found = {path: field.meaning for path, field in fields(Derived()).items()}
    assert found == {
        "a": "another one",
        "b": "first line, second line and what stands beside",
        "c": "in the middle",
        "d": "of its own",
    }
    assert fields(Derived())["d"].kind == int | None


def test_values_by_path():
    found = values(ModelConfig())
    assert found["decoder.rope_scaling"] is None and found["image.encoders.0.layers"] == 24
    assert not {"image", "image.encoders", "image.encoders.0"} & set(found)


def test_attributes_that_are_no_fields_are_found():
    config = TrainConfig()
    assert strays(config) == []
    config.step, config.optimizer.learning_rat = 1, 2
    config.model.image.encoders[0].layer = config.model.image.adapter.queries = (
        3  # the latter of another kind
    )
    assert sorted(strays(config)) == [
        "model.image.adapter.queries",
        "model.image.encoders.0.layer",
        "optimizer.learning_rat",
        "step",
    ]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("eval.batch_sise", "eval.batch_size"),
        ("batchsize", "batch_size"),
        ("model.decoder.layer", "model.decoder.layers"),
        ("model.encoder.image_size", "model.image.encoders.0.image_size"),
        ("model.adapter.dropout", "model.image.adapter.dropout"),
        ("nonsense", None),
    ],
)
def test_what_was_meant(path, meant):
    assert nearest(path, fields(TrainConfig())) == meant
