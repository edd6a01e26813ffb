"""omnifusion_jax: adapter-based multimodal language models in JAX.

import omnifusion_jax as of

model = of.load("omnifusion-tiny")
messages = [{"role": "user", "content": "What is it?"}]
answers = model.generate([of.Request(images=["picture.png"], messages=messages)])
"""

import importlib
import sys
import types

# The module of each name. It is imported when the name is asked for, so that processes that read data do not
# import JAX.
HOMES = {
    "Answer": "inference.answer",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Engine": "inference.engine",
    "GenerationConfig": "config",
    "Model": "inference.model",
    "OmniLMMChat": "omnilmm",
    "OmniFusionError": "errors",
    "Request": "data.dialogues",
    "Score": "inference.scoring",
    "Stop": "training.signals",
    "Stopped": "training.signals",
    "convert": "checkpoints.convert",
    "evaluate": "api",
    "load": "api",
    "train": "run",
}

__all__ = list(HOMES)


class Package(types.ModuleType):
    """Keeps `of.train` and `of.convert` functions when the command lines of these names are imported."""

    def __setattr__(self, name, value):
        if name not in HOMES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__():
    return __all__
