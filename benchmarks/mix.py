"""Memory that the mix of CLIP-L/14-336's hidden states takes, as the compiler counts it.

python benchmarks/mix.py [pictures]
"""

import sys

import jax
import numpy as np

from omnifusion_jax.config import adapter
from omnifusion_jax.models.adapters import mix
from omnifusion_jax.models.encoder_presets import encoder
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx


def stacked(combination, tower, images):
    """The same mix, with all hidden states in memory at once."""
    states = jax.vmap(tower.features)(tower.hidden_states(images))
    term = lambda layer, state: layer(combination.norm, state)
    return jax.vmap(term)(combination.layers, states).sum(axis=0)


def main(pictures=8):
    c = encoder("clip-vit-l-14-336")

    def make():
        fresh = mix.Mix(c, adapter("sum"), c.width, rngs=nnx.Rngs(0))
        return fresh, VisionTransformer(c, rngs=nnx.Rngs(0))

    combination, tower = jax.eval_shape(lambda m: cast(m, "bfloat16"), nnx.eval_shape(make))
    images = jax.ShapeDtypeStruct((pictures, c.image_size, c.image_size, 3), np.uint8)
    states = (c.layers + 1) * pictures * (1 + c.patches) * c.width * 2
    print(f"{pictures} pictures, bfloat16: all {c.layers + 1} hidden states are {states / 2**20:,.0f} MiB")
    ways = {"accumulated in the encoder's scan": mix.mixed, "from a stack of hidden states": stacked}
    for name, f in ways.items():
        loss = lambda *args, f=f: (f(*args) ** 2).sum()
        sizes = []
        for program in (f, jax.grad(loss)):
            memory = jax.jit(program).lower(combination, tower, images).compile().memory_analysis()
            sizes.append(memory.temp_size_in_bytes / 2**20)
        print(f"{name:36} temporary: {sizes[0]:>8,.0f} MiB forward, {sizes[1]:>8,.0f} MiB with the gradient")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
