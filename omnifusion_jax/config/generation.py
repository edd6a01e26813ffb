"""How answers are drawn."""

import dataclasses
import json
from typing import Self

from omnifusion_jax.config.base import check, one_of
from omnifusion_jax.errors import ConfigError

# How the authors of a system draw its answers
RECIPES = {
    # three beams, no newline, no free-standing colon
    "omnifusion-1.1": {
        "max_new_tokens": 50,
        "num_beams": 3,
        "early_stopping": True,
        "no_repeat_ngram_size": 4,
        "banned": ("\n", "</s>", ":"),
        "ban_newline": True,
        "forced_eos": True,
    },
    "omnilmm-12b": {
        "max_new_tokens": 1024,
        "temperature": 0.6,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    },
    # MiniCPM-V 1.0 takes beams by default and samples where it is asked to, 2.0 the other way round
    "minicpm-v-1.0": {"max_new_tokens": 2048, "num_beams": 3, "repetition_penalty": 1.2},
    "minicpm-v-1.0-sampling": {"max_new_tokens": 2048, "temperature": 0.6, "top_k": 100, "top_p": 0.8},
    "minicpm-v-2.0": {
        "max_new_tokens": 1024,
        "temperature": 0.7,
        "top_k": 100,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
    },
    "minicpm-v-2.0-beams": {"max_new_tokens": 1024, "num_beams": 3, "repetition_penalty": 1.2},
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How answers are drawn. Greedy by default.

    With `num_beams` > 1 it is beam search, with the semantics of Hugging Face's `generate`; with
    `temperature` > 0 it is sampling.
    """

    max_new_tokens: int = 128  # of an answer, the end of sequence included
    min_new_tokens: int = 0  # before an answer may end by an end token
    num_beams: int = 1  # above 1: beam search
    # answers to each request: as many draws, or the best of the beams; the first is the answer, see `others`
    num_return_sequences: int = 1
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # sampling: so many of the likeliest tokens; 0: all
    top_p: float = 1.0  # sampling: the likeliest tokens that have this probability together
    min_p: float = 0.0  # sampling: tokens at least so likely as this share of the likeliest; 0: all
    # beams: stop as soon as num_beams candidates are finished (true), when the others look worse by their
    # score so far (false), or when none can become better ("never")
    early_stopping: bool | str = False
    length_penalty: float = 1.0  # beams: score is the sum of log probabilities over length ** length_penalty
    # scores of generated tokens are divided by it, negative ones multiplied; 1: off
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # no sequence of so many tokens is generated twice; 0: off
    banned: tuple[str, ...] = ()  # strings that may not be produced, as the tokenizer cuts them
    banned_tokens: tuple[tuple[int, ...], ...] = ()  # token sequences that may not be produced
    # the bare newline token is banned, which `banned` misses if the tokenizer puts a space before a newline
    ban_newline: bool = False
    suppress_tokens: tuple[int, ...] = ()  # tokens that are never chosen
    begin_suppress_tokens: tuple[int, ...] = ()  # tokens that do not begin an answer
    forced_bos_token_id: int | None = None  # the token that begins every answer
    forced_eos: bool = False  # the last token that max_new_tokens allows is the end-of-sequence token
    forced_eos_token_id: int | None = None  # the last token that max_new_tokens allows is this one
    stop_token_ids: tuple[int, ...] = ()  # tokens that end an answer, beside the end of sequence
    stop_strings: tuple[str, ...] = ()  # an answer ends with the token that completes one of these
    choices: tuple[str, ...] = ()  # the answer is one of these
    regex: str = ""  # the answer is a text that this regular expression (of Rust's kind) matches as a whole
    json_schema: str = ""  # the answer is JSON by this schema, which is itself given as JSON
    likeliest: int = 0  # so many of the likeliest tokens of each step are told with the answer
    seed: int = 0  # of sampling

    @classmethod
    def named(cls, name: str) -> Self:
        """The recipe published with a system, a row of RECIPES. Raises ConfigError for an unknown name."""
        one_of("the name of a recipe", name, RECIPES)
        return cls(**RECIPES[name])

    @classmethod
    def official(cls) -> Self:
        """The recipe published with OmniFusion-1.1."""
        return cls.named("omnifusion-1.1")

    @property
    def form(self) -> str:
        """The field that gives the form of answers, or "" where none does."""
        return next((name for name in ("choices", "regex", "json_schema") if getattr(self, name)), "")

    def check_form(self):
        """Refuses what could end an answer before its form is complete, or break it."""
        forms = [name for name in ("choices", "regex", "json_schema") if getattr(self, name)]
        check(len(forms) < 2, f"an answer has one form: give one of {', '.join(forms)}")
        check(all(self.choices), "one of choices is empty: an answer has text")
        if self.json_schema:
            try:
                json.loads(self.json_schema)
            except ValueError as error:
                raise ConfigError(f"json_schema is not JSON ({error})") from error
        if forms:
            others = (
                "forced_eos",
                "forced_eos_token_id",
                "forced_bos_token_id",
                "stop_token_ids",
                "stop_strings",
            )
            for name in others:
                check(
                    getattr(self, name) in (False, None, ()),
                    f"{forms[0]} says what answers are and where they end, and so does {name}: give one",
                )

    def __post_init__(self):
        self.check_form()
        check(self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}")
        check(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens {self.min_new_tokens} is not in [0, max_new_tokens {self.max_new_tokens}]",
        )
        check(self.num_beams > 0, f"num_beams is {self.num_beams}")
        check(self.temperature >= 0, f"temperature is {self.temperature}")
        check(self.num_return_sequences > 0, f"num_return_sequences is {self.num_return_sequences}")
        check(
            self.num_beams == 1 or self.num_return_sequences <= self.num_beams,
            f"num_return_sequences {self.num_return_sequences} is more than num_beams {self.num_beams}",
        )
        check(
            self.num_return_sequences == 1 or self.num_beams > 1 or self.temperature > 0,
            f"num_return_sequences is {self.num_return_sequences}, but greedy decoding gives one answer: "
            "set a temperature or num_beams",
        )
        check(0 < self.top_p <= 1, f"top_p {self.top_p} is not in (0, 1]")
        check(0 <= self.min_p <= 1, f"min_p {self.min_p} is not in [0, 1]")
        check(self.top_k >= 0, f"top_k is {self.top_k}; 0 means all")
        check(
            self.early_stopping in (True, False, "never"),
            f'early_stopping is {self.early_stopping!r}; choose from true, false, "never"',
        )
        check(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; 1 means off")
        check(
            self.no_repeat_ngram_size >= 0,
            f"no_repeat_ngram_size is {self.no_repeat_ngram_size}; 0 means off",
        )
        check(
            not (self.forced_eos and self.forced_eos_token_id is not None),
            f"forced_eos and forced_eos_token_id {self.forced_eos_token_id} both say what the last token is: "
            "give one of them",
        )
        check(all(self.stop_strings), "a string of stop_strings is empty: every answer would end at once")
        check(0 <= self.likeliest <= 64, f"likeliest {self.likeliest} is not in [0, 64]")
        check(0 <= self.seed < 2**32, f"seed {self.seed} is not in [0, 2**32)")
