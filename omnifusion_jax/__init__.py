"""omnifusion_jax: adapter-based multimodal language models in JAX.

import omnifusion_jax as of

model = of.load("omnifusion-tiny")
answers = model.generate([of.Request(images=["picture.png"], messages=[{"role": "user", "content": "What is it?"}])])
"""

from omnifusion_jax.api import load
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import CheckpointError, ConfigError, DataError, OmniFusionError
from omnifusion_jax.inference.model import Answer, Model

__all__ = ["Answer", "CheckpointError", "ConfigError", "DataError", "GenerationConfig", "Model", "OmniFusionError", "Request", "load"]
