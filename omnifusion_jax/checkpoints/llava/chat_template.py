"""Our layouts as chat templates: SOI, EOI, USER and BOT are tokens there, which split the text as our pieces do."""

import json

import numpy as np

from omnifusion_jax.batch import SPECIAL, TEXT
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.chat_template import Template
from omnifusion_jax.data.dialogues import MARKS, Dialogue, Media
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.data.pictures import Prepared
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.tables import LAYOUTS

ROLES = """\
{%- for message in messages if message['role'] not in ('user', 'assistant') -%}
{{- raise_exception('a turn is from user or assistant, not from ' + message['role']) -}}
{%- endfor -%}
"""
PICTURES = """\
{%- set ns = namespace(pictures=0, joined=false) -%}
{%- for message in messages if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{%- set ns.pictures = ns.pictures + 1 -%}{{- SOI + IMAGE + EOI -}}{%- endfor -%}
{%- endfor -%}
"""
CONTENT = """\
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}
"""
VECTORS = f"""\
{{{{- PROMPT -}}}}
{PICTURES}
{{%- for message in messages -%}}
{{{{- USER if message['role'] == 'user' else BOT -}}}}
{CONTENT}
{{{{- END if message['role'] == 'assistant' -}}}}
{{%- endfor -%}}
{{{{- BOT if add_generation_prompt -}}}}
"""
# Text that follows text without a token between begins with the space that our piece has before it
WORDS = f"""\
{{{{- PROMPT -}}}}
{PICTURES}
{{%- set ns.joined = PROMPT and not ns.pictures -%}}
{{%- for message in messages -%}}
{{%- set answered = add_generation_prompt if loop.last else loop.nextitem['role'] == 'assistant' -%}}
{{{{- ' ' if ns.joined -}}}}{{{{- USER if message['role'] == 'user' -}}}}
{CONTENT}
{{{{- END if message['role'] == 'assistant' else BOT if answered -}}}}
{{%- set ns.joined = message['role'] == 'user' -%}}
{{%- endfor -%}}
"""
SOURCES = {"omnifusion": VECTORS, "original": VECTORS, "text": WORDS}

PROBES = (  # dialogues on which a template must give our ids: (turns, pictures)
    (("What is it?",), 0),
    (("What is it?",), 1),
    ((" Two  spaces,\na line: 3.5 ", "Yes, it is.", "\u041f\u043e\u0447\u0435\u043c\u0443?"), 0),
    (("Why?", "A red cat", "Where?", "\nBelow.", "And this?"), 1),
)


def tokens(c: ModelConfig):
    """{name of a trained vector: the token that stands for it}"""
    return {name: f"<{name.upper()}>" for name in LAYOUTS[c.layout].vectors}


def source(c: ModelConfig, eos) -> str:
    """The chat template of a layout; `eos` is the text of the end-of-sequence token."""
    if c.layout == "template":
        return c.template
    values = {
        "PROMPT": c.prompt,
        "USER": c.user,
        "BOT": c.bot,
        "IMAGE": c.image_token,
        "END": "" if c.layout == "original" else eos,
    }
    values |= {name.upper(): token for name, token in tokens(c).items()}
    return (
        ROLES
        + "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items())
        + SOURCES[c.layout]
    )


def check_template(c: ModelConfig, tokenizer, written):
    """Raises CheckpointError where the template, encoded by the tokenizer in `written`, gives other ids than our layout does by `tokenizer`'s."""
    theirs = Tokenizer(written)
    layout, template = (
        Layout(Tokenizer(tokenizer), c, c.decoder.max_length),
        Template(source(c, theirs.names["eos_token"]), c.image_token, theirs),
    )
    ids = {c.special.index(name): theirs.mark(token) for name, token in tokens(c).items()}
    picture = Prepared(
        tuple(np.zeros((1, view.size, view.size, 3), np.uint8) for view in c.image.views),
        np.zeros(1, np.int32),
        1,
    )
    for texts, pictures in PROBES:
        turns = tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
        sample = layout(
            Dialogue("export", turns, (Media("image", None),) * pictures), [picture] * pictures, ask=True
        )
        shown = (("user", MARKS["image"] * pictures + texts[0]), *turns[1:])
        ours = [
            int(token) if kind == TEXT else ids[int(index)] if kind == SPECIAL else template.image_id
            for token, kind, index in zip(sample.tokens, sample.kind, sample.index, strict=True)
        ]
        found = template(shown, True, "export")[0].tolist()
        if ours != found:
            raise CheckpointError(
                f"layout {c.layout!r} encodes each text alone, and this tokenizer does not cut a whole prompt into the same tokens "
                f"({texts}: {ours}, as a chat template {found})"
            )
