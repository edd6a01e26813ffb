"""Files on disk and on the Hugging Face Hub, which know nothing of models.

Open lazy_array.py first: arrays that are read when they are used. weights.py reads and writes them.
"""
