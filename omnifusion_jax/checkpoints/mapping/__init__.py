"""Conversion as data: the tables that map foreign tensors to our arrays, and the engine that applies them.

Open tensors.py first: it explains what a table looks like.
"""
