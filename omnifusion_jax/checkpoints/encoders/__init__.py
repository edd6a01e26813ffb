"""Checkpoints of vision towers, one file for each family or library.

Open vision_towers.py first: it lists the families, and finds, reads and writes a tower. A short example of a
family is clip.py; base.py and hugging_face.py have what families share.
"""
