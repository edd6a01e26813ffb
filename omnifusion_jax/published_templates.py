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

# Pictures before the text have a line of their own each, others stand within it.
PARTS = """\
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- set seen = namespace(text=false) -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
PICTURE
{{- '\\n' if not seen.text -}}
{%- else -%}
{%- set seen.text = true -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""
OMNILMM_SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the "
    "human's questions."
)
OMNILMM_PICTURE = "{{- '<im_start><im_patch><im_end>' -}}"
OMNILMM = f"""\
{{%- if messages[0]['role'] != 'system' -%}}
{{{{- '<|system|>\\n' + \"{OMNILMM_SYSTEM}\" + eos_token + '\\n' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{{{- '<|' + message['role'] + '|>\\n' -}}}}
{PARTS.replace("PICTURE", OMNILMM_PICTURE)}
{{{{- eos_token + '\\n' -}}}}
{{%- endfor -%}}
{{{{- '<|assistant|>\\n' if add_generation_prompt -}}}}
"""

MINICPM_PICTURE = """\
{{- '<image><unk></image>' -}}
{%- if part['rows'] -%}
{{- '<slice>' -}}
{%- for row in range(part['rows']) -%}
{{- '\\n' if row -}}{{- '<image><unk></image>' * part['columns'] -}}
{%- endfor -%}
{{- '</slice>' -}}
{%- endif -%}
"""
MINICPM = f"""\
{{%- for message in messages if message['role'] != 'system' -%}}
{{{{- {{'assistant': '<AI>'}}.get(message['role'], '<用户>') -}}}}
{PARTS.replace("PICTURE", MINICPM_PICTURE)}
{{%- endfor -%}}
{{{{- '<AI>' if add_generation_prompt -}}}}
"""

TEMPLATES = {
    "llava-1.5": VICUNA,  # USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: ...
    "llava-next-mistral": MISTRAL,  # [INST] <image>\nWhat? [/INST] A cat.</s>[INST] ...
    "omnilmm": OMNILMM,  # Zephyr's: ...</s>\n<|user|>\n<im_start>...<im_end>\nWhat?</s>\n<|assistant|>\n
    "minicpm-v": MINICPM,  # <用户><image>...</image>\nWhat?<AI>A cat.<用户>...
}
