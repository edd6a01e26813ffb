"""Flags that say which model answers."""

from absl import flags

from omnifusion_jax.api import load
from omnifusion_jax.checkpoints.base import WEIGHTS
from omnifusion_jax.cli.overrides import MeshFlags
from omnifusion_jax.inference.model import Model

# A flag defined by this file belongs to the command line that asks for it.
flags.disclaim_key_flags()


class ModelFlags:
    """--model, --vision, --dtype and --weights; and the section `mesh`, --mesh.FIELD."""

    def __init__(self):
        self.name = flags.DEFINE_string("model", "omnifusion-tiny", "Bundled name, directory or hub id.")
        self.vision = flags.DEFINE_string("vision", None, "Vision tower, where the model does not hold one.")
        self.dtype = flags.DEFINE_enum(
            "dtype",
            None,
            ["bfloat16", "float32"],
            "Of parameters and computation; float32 on CPUs, else bfloat16, when not given.",
        )
        self.weights = flags.DEFINE_enum(
            "weights", None, WEIGHTS, "What kernels of the decoder are kept in; as stored, when not given."
        )
        self.mesh = MeshFlags()

    def load(self) -> Model:
        """The model that the flags name. Raises what `api.load` raises."""
        how = {"dtype": self.dtype.value, "weights": self.weights.value, "mesh": self.mesh.value}
        return load(self.name.value, vision=self.vision.value, **how)
