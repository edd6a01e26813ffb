"""Reads, writes and converts checkpoints: this library's own, OmniFusion's, LLaVA's, and parts of models.

Open load.py first: it recognises a source's format and reads it. convert.py writes another format, native.py
is the library's own. The sub-folders go from files (storage) through names (mapping) to whole models.
"""
