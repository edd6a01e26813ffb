"""Our layouts as chat templates.

The vectors SOI, EOI, USER and BOT become tokens there, which split the text where our layouts split it.
"""

import json
from pathlib import Path

import numpy as np

from omnifusion_jax.batch import SPECIAL, TEXT
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.chat_template import Template
from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.data.modality import Prepared
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.tables import LAYOUTS, MODALITIES

ROLES = """\
{%- for message in messages if message['role'] not in ('user', 'assistant') -%}
{{- raise_exception('a turn is from user or assistant, not from ' + message['role']) -}}
{%- endfor -%}
"""
PICTURES = """\
{%- set ns = namespace(pictures=0, joined=false) -%}
{%- for message in messages if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}\
{%- set ns.pictures = ns.pictures + 1 -%}{{- SOI + IMAGE + EOI -}}{%- endfor -%}
{%- endfor -%}
"""
CONTENT = """\
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}\
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}\
{%- endif -%}
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
# Where a text follows another with no token between them, it begins with the space that our layout puts there
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


def tokens(c: ModelConfig) -> dict[str, str]:
    """{name of a trained vector: the token that stands for it}"""
    return {name: f"<{name.upper()}>" for name in LAYOUTS[c.layout].vectors}


def source(c: ModelConfig, eos: str) -> str:
    """The chat template of the config's layout; `eos` is the text of the end-of-sequence token."""
    if c.layout == "template":
        return c.template
    values = {
        "PROMPT": c.prompt,
        "USER": c.user,
        "BOT": c.bot,
        "IMAGE": c.image.token,
        "END": "" if c.layout == "original" else eos,
    }
    values |= {name.upper(): token for name, token in tokens(c).items()}
    constants = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items())
    return ROLES + constants + SOURCES[c.layout]


def check_template(c: ModelConfig, tokenizer: str | Path, written: str | Path):
    """Compares the chat template with our layout on a few dialogues.

    The template is encoded by the tokenizer in the directory `written`, our layout by the one in `tokenizer`.

    Raises:
      CheckpointError: they give different ids.
    """
    theirs = Tokenizer(written)
    layout = Layout(Tokenizer(tokenizer), c, c.decoder.max_length)
    template = Template(source(c, theirs.names["eos_token"]), {"image": c.image.token}, theirs)
    (image_id,) = template.ids
    ids = {c.special.index(name): theirs.mark(token) for name, token in tokens(c).items()}
    views = tuple(np.zeros((1, view.size, view.size, 3), np.uint8) for view in c.image.views)
    picture = Prepared(views, np.zeros(1, np.int32), 1)

    def token_of(token, kind, index):
        if kind == TEXT:
            return int(token)
        return ids[int(index)] if kind == SPECIAL else image_id

    for texts, pictures in PROBES:
        turns = tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
        dialogue = Dialogue("export", turns, (Media("image", None),) * pictures)
        sample = layout(dialogue, [picture] * pictures, ask=True)
        shown = (("user", MODALITIES["image"].mark * pictures + texts[0]), *turns[1:])
        ours = [
            token_of(*position) for position in zip(sample.tokens, sample.kind, sample.index, strict=True)
        ]
        found = template(shown, True, "export")[0].tolist()
        if ours != found:
            raise CheckpointError(
                f"layout {c.layout!r} encodes each text alone, and this tokenizer does not cut "
                f"a whole prompt into the same tokens ({texts}: {ours}, as a chat template {found})"
            )
