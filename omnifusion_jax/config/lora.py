"""The config of low-rank factors, and of the frozen kernels under them."""

import dataclasses
import re

from omnifusion_jax.config.base import check, one_of
from omnifusion_jax.errors import ConfigError


@dataclasses.dataclass
class LoraConfig:
    """LoRA (arXiv 2106.09685): kernels stay frozen, and the product of two small factors is added to each."""

    rank: int = 0  # inner dimension of the factors; 0: there are none
    alpha: float = 16.0  # what they add is multiplied by alpha / rank
    dropout: float = 0.0  # share of what enters the factors that is dropped, in training only
    targets: str = r"decoder/.*/kernel"  # regex of the decoder's kernels that have factors
    # what frozen kernels of the decoder are kept in: compute_dtype; or int8, int4 with a scale for 64 values
    base: str = "compute_dtype"

    def validate(self):
        check(self.rank >= 0, f"lora.rank is {self.rank}; it must be positive, or 0 for no factors")
        check(self.alpha > 0, f"lora.alpha {self.alpha} is not positive")
        check(0 <= self.dropout < 1, f"lora.dropout {self.dropout} is not in [0, 1)")
        one_of("lora.base", self.base, ("compute_dtype", "int8", "int4"))
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ConfigError(f"lora.targets: {self.targets!r} is no regular expression: {error}") from None
