"""LLaVA and LLaVA-NeXT as transformers has them, read and written.

Open read.py first, then tables.py for the tensor names and settings.py for config.json. export.py writes
them; written_template.py turns our prompt layouts into chat templates for it.
"""
