"""The config of a decoder: a language model."""

import dataclasses

from omnifusion_jax.config.base import check
from omnifusion_jax.tables import DECODERS


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class RopeScaling:
    """How Llama 3.1 stretches rotary positions.

    Frequencies that turn often enough within the length of the first training are kept, low ones are divided.
    """

    factor: float = 8.0  # low frequencies are divided by it
    low: float = 1.0  # a frequency is low if it turns at most so often over trained_length
    high: float = 4.0  # a frequency is kept if it turns at least so often; those in between are mixed
    trained_length: int = 8192  # positions of the first training


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class DecoderConfig:
    """A decoder of the Llama, Mistral and Qwen families.

    It has grouped-query attention, rotary positions, RMSNorm and SwiGLU.
    """

    family: str = "mistral"  # or llama, minicpm, qwen2, qwen3: what Hugging Face calls its model_type
    vocab: int = 32000  # tokens
    width: int = 4096  # of an embedding
    layers: int = 32  # blocks
    heads: int = 32  # of queries
    kv_heads: int = 8  # of keys and values
    head_dim: int = 128  # width of a head
    mlp: int = 14336  # hidden width of the feed-forward part
    rope_theta: float = 10000.0  # base of the rotary positions' wavelengths
    rope_scaling: RopeScaling | None = None  # as Llama 3.1 has it
    eps: float = 1e-5  # of norms
    window: int | None = 4096  # how many positions a token sees, its own and those before it; None: all
    max_length: int = 32768  # positions that it was trained for
    qkv_bias: bool = False  # of queries, keys and values
    qk_norm: bool = False  # an RMS norm of each head's queries and keys
    tied: bool = False  # the output head is the embedding table
    embed_scale: float = 1.0  # factor of token embeddings
    residual_scale: float = 1.0  # factor of what a block adds
    logit_scale: float = 1.0  # factor of the scores

    @property
    def group(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.heads // self.kv_heads

    def validate(self):
        DECODERS[self.family]
        check(
            self.heads % self.kv_heads == 0,
            f"decoder.heads {self.heads} is not a multiple of decoder.kv_heads {self.kv_heads}",
        )
        check(self.head_dim % 2 == 0, f"decoder.head_dim {self.head_dim} is odd; rotary positions need pairs")
