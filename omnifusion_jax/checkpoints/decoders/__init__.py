"""Checkpoints of language models.

Open language_models.py, the only file: tensor names and config.json of Mistral, Llama, Qwen2 and Qwen3.
"""
