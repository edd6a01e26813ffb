"""The config of the objective "preference"."""

import dataclasses

from omnifusion_jax.config.base import check


@dataclasses.dataclass
class PreferenceConfig:
    """DPO (arXiv 2305.18290); and dense DPO (RLHF-V, arXiv 2312.00849), in which what changed counts more."""

    beta: float = 0.1  # how much a likelihood counts; the larger, the less the model moves from the reference
    changed_weight: float = 1.0  # weight of tokens that one answer has in place of the other's; 1: plain DPO
    average: bool = False  # log-likelihoods are means over their weighted tokens, not sums
    smoothing: float = 0.0  # share of the pairs that may be the wrong way round
    sft: float = 0.0  # weight of minus the log-likelihood of the chosen answer, which is added
    # folder of Parquet files with the reference's log-likelihoods, made by the run if there is none;
    # empty: beside the data, NAME.reference
    reference: str = ""

    def validate(self):
        check(self.beta > 0, f"preference.beta {self.beta} is not positive")
        check(self.changed_weight > 0, f"preference.changed_weight {self.changed_weight} is not positive")
        check(
            0 <= self.smoothing < 0.5,
            f"preference.smoothing is {self.smoothing}: it is a share of the pairs below 0.5",
        )
        check(self.sft >= 0, f"preference.sft is {self.sft}; it must not be negative")
