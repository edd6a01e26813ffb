"""Chat templates of published systems, for checkpoints and presets that bring none.

Both take `content` as a string or as a list of {"type": "image"} and {"type": "text", "text": ...}, and put
pictures first. They end an answer with the end-of-sequence token, as in training. A tokenizer adds the
beginning-of-sequence token before the whole text.
"""

CONTENT = """\
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
"""

VICUNA = f"""\
{{%- for message in messages -%}}
{{{{- '' if message['role'] == 'system' else message['role'].upper() + ': ' -}}}}
{CONTENT}
{{{{- eos_token if message['role'] == 'assistant' else ' ' -}}}}
{{%- endfor -%}}
{{{{- 'ASSISTANT:' if add_generation_prompt -}}}}
"""

MISTRAL = f"""\
{{%- for message in messages -%}}
{{{{- {{'assistant': ' ', 'system': '<<SYS>>\\n'}}.get(message['role'], '[INST] ') -}}}}
{CONTENT}
{{{{- {{'assistant': eos_token, 'system': '\\n<</SYS>>\\n\\n'}}.get(message['role'], ' [/INST]') -}}}}
{{%- endfor -%}}
"""

TEMPLATES = {
    "llava-1.5": VICUNA,  # USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: ...
    "llava-next-mistral": MISTRAL,  # [INST] <image>\nWhat? [/INST] A cat.</s>[INST] ...
}
