"""omnifusion_jax: adapter-based multimodal language models in JAX.

import omnifusion_jax as of

model = of.load("omnifusion-tiny")
answers = model.generate([of.Request(images=["picture.png"], messages=[{"role": "user", "content": "What is it?"}])])
"""

import importlib

HOMES = {  # where each name lives; it is imported when it is asked for, since processes that read data have no use for JAX
    "Answer": "inference.model",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "GenerationConfig": "config",
    "Model": "inference.model",
    "OmniFusionError": "errors",
    "Request": "data.dialogues",
    "load": "api",
}

__all__ = list(HOMES)


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__():
    return __all__
