"""The config of a run: its data, its optimizer, its devices and what it writes."""

import dataclasses
import re

from omnifusion_jax.config.base import check, one_of
from omnifusion_jax.config.lora import LoraConfig
from omnifusion_jax.config.model import ModelConfig
from omnifusion_jax.config.preference import PreferenceConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.tables import KERNELS, OBJECTIVES


@dataclasses.dataclass
class OptimizerConfig:
    name: str = "adamw"  # or adafactor, lion, muon (matrices of hidden layers; adamw for the rest)
    learning_rate: float = 1e-3  # the highest; multiplied by the factors of train_parts
    weight_decay: float = 0.0  # a step takes this share of a matrix, times the learning rate, away
    schedule: str = "cosine"  # to zero at the horizon; or constant
    warmup: float = 0.01  # share of the horizon in which the learning rate rises from zero
    horizon: float = 1.0  # length of the schedule, in runs; at 8 the run ends after an eighth of it
    clip: float | None = 1.0  # largest global gradient norm; None: no clipping
    beta2: float = 0.999  # adamw: how slowly the mean of squared gradients forgets
    moments: str = "float32"  # what moments are kept in; or bfloat16, or int8 with a scale for 128 of them

    def validate(self):
        one_of("optimizer.name", self.name, ("adamw", "adafactor", "lion", "muon"))
        one_of("optimizer.schedule", self.schedule, ("cosine", "constant"))
        one_of("optimizer.moments", self.moments, ("float32", "bfloat16", "int8"))
        factored = self.name == "adafactor"
        check(not (factored and self.weight_decay), "optimizer.weight_decay does not work with adafactor")
        check(
            self.moments == "float32" or not factored,
            f"optimizer.moments={self.moments}: adafactor has no moments to speak of. "
            "Leave it out, or choose another optimizer.name",
        )
        check(
            self.beta2 == 0.999 or self.name in ("adamw", "muon"),
            f"optimizer.beta2 is for adamw, and for what muon leaves to it; {self.name} has none",
        )
        check(self.learning_rate > 0, f"optimizer.learning_rate {self.learning_rate} is not positive")
        check(
            0 <= self.warmup < 1, f"optimizer.warmup is a share of the horizon in [0, 1), not {self.warmup}"
        )
        check(
            self.horizon >= 1,
            f"optimizer.horizon is {self.horizon}: below 1 the rate would be 0 before the run ends",
        )


@dataclasses.dataclass
class SetConfig:
    """A set of data in a mixture."""

    name: str = ""  # how messages and reports call it
    path: str = ""  # as data.path
    images: str = ""  # folder that image names are relative to
    repeats: float = 1.0  # how often an epoch takes all its records; 0.5: every second epoch has the same
    samples: int = 0  # how many records an epoch takes instead; 0: as `repeats` says
    # its part of an epoch, relative to the weights of the others, instead; an epoch is then as long as all
    # sets together. All sets have weights, or none
    weight: float = 0.0
    layout: str | None = None  # instead of model.layout, whose trained vectors it must do with
    prompt: str | None = None  # instead of model.prompt
    get: str = ""  # where it comes from, which is said when it is missing

    def validate(self):
        name = self.name or "a set"
        check(bool(self.path), f"data.sets: {name} has no path")
        for field in ("repeats", "samples", "weight"):
            value = getattr(self, field)
            check(value >= 0, f"data.sets: {field} of {name} is {value}; it must not be negative")
        drawn = self.samples or self.weight or self.repeats
        check(bool(drawn), f"data.sets: repeats of {name} is 0: nothing of it would be read. Leave it out")
        both = bool(self.samples) + bool(self.weight) + (self.repeats != 1.0) > 1
        check(not both, f"data.sets: {name} has more than one of repeats, samples and weight")


@dataclasses.dataclass
class DataConfig:
    path: str = ""  # a file or folder of dialogues (docs/data.md), or synthetic:<kind>
    images: str = ""  # folder that image names are relative to, and outside of which nothing is read
    sets: tuple[SetConfig, ...] = ()  # a mixture of several, instead of `path`
    num_workers: int = 0  # processes that read and lay out dialogues; 0: threads of this process
    shuffle: bool = True  # in a new order every epoch, drawn from `seed`
    on_bad_sample: str = "raise"  # or skip: left out, counted, reported; the run stops above `bad_share`
    bad_share: float = 0.01  # skip: share of the records that may be bad; one bad record is always allowed
    # check every record's text and picture header while the step compiles, in processes of its own; or off
    check: str = "first_epoch"
    max_length: int = 2048  # tokens of a laid-out dialogue, feature rows included
    # a dialogue that is longer: raise; skip: left out and counted; or cut: after the last answer that fits
    on_long: str = "raise"
    packing: bool = False  # several dialogues a row, each of which sees only itself
    row_length: int = 0  # packing: tokens of a row; 0: max_length
    row_tiles: int = 0  # packing: tiles of media that a row has room for; 0: as many as its tokens can show
    window: int = 16  # packing: dialogues that wait for a row, of which those are taken that fill it best
    max_pixels: int = 50_000_000  # larger pictures are refused, by what their header says
    draft: bool = False  # decode large JPEG files at a part of their size: faster, and other pixels

    def validate(self):
        one_of("data.on_bad_sample", self.on_bad_sample, ("raise", "skip"))
        one_of("data.on_long", self.on_long, ("raise", "skip", "cut"))
        one_of("data.check", self.check, ("first_epoch", "off"))
        check(
            0 <= self.bad_share <= 1,
            f"data.bad_share is a share of the records from 0 to 1, not {self.bad_share}",
        )
        check(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; it must be 0 or more")
        check(
            bool(self.path or self.sets),
            "data.path is empty: give a LLaVA JSON file, "
            "--config.data.path=dialogues.json --config.data.images=FOLDER",
        )
        check(
            not (self.path and self.sets),
            f"data.path={self.path} and data.sets are both given: --config.data.path= leaves the mixture, "
            "--config.data.sets=[] the path",
        )
        for one in self.sets:
            one.validate()
        names = [one.name for one in self.sets]
        check(all(names) and len(set(names)) == len(names), f"data.sets need names of their own: {names}")
        weighted = [one.name for one in self.sets if one.weight]
        check(
            len(weighted) in (0, len(names)),
            f"data.sets: only {', '.join(weighted)} have a weight; give one to all sets, or to none",
        )
        row = self.row_length or self.max_length
        check(row >= self.max_length, f"data.row_length {row} is less than data.max_length {self.max_length}")
        check(
            self.window > 0 and self.row_tiles >= 0,
            "data.window must be positive, data.row_tiles not negative",
        )
        unpacked = self.packing or not (self.row_length or self.row_tiles)
        check(unpacked, "data.row_length and data.row_tiles work with data.packing only")


@dataclasses.dataclass
class MeshConfig:
    data: int = 1  # copies of the parameters
    fsdp: int = -1  # devices that a copy is spread over; -1: all devices that remain
    tensor: int = 1  # devices that share the heads and hidden widths of the decoder
    dcn_data: int = 1  # slices of a TPU, or groups of hosts, that hold `data` copies each

    def validate(self):
        sizes = (self.data, self.fsdp, self.tensor)
        check(
            sum(s == -1 for s in sizes) <= 1 and all(s == -1 or s > 0 for s in sizes),
            f"mesh sizes {sizes}: positive, at most one -1",
        )
        check(self.dcn_data > 0, f"mesh.dcn_data is {self.dcn_data}; it must be positive")


@dataclasses.dataclass
class CheckpointConfig:
    every_steps: int = 500  # how often the state of the run is saved; 0: by time alone
    # how often besides, by the clock; 0: by steps alone.
    # With both 0 the state is saved at the end and when the run is stopped
    every_minutes: float = 0.0
    keep: int = 2  # how many of the newest states are kept; while one is written there is one more
    # keep besides the state with the best figure of this name: accuracy, the highest, or loss, the lowest.
    # Its model is written to WORKDIR/best
    keep_best: str = ""
    # what the finished run writes to WORKDIR/model: the parts that were trained; or complete: the whole model
    final: str = "trained"

    def validate(self):
        check(
            self.every_steps >= 0 and self.every_minutes >= 0,
            "checkpoint.every_steps and checkpoint.every_minutes must not be negative",
        )
        check(self.keep > 0, "checkpoint.keep must be positive")
        check(
            not self.keep_best or self.keep_best.endswith(("accuracy", "loss")),
            f"checkpoint.keep_best is {self.keep_best!r}; it names a figure that ends in accuracy (more is "
            "better) or in loss (less is)",
        )
        one_of("checkpoint.final", self.final, ("trained", "complete"))


@dataclasses.dataclass
class EvalConfig:
    path: str = ""  # held-out dialogues, in the form of data.path; empty: no evaluation
    images: str = ""  # folder that image names are relative to
    count: int = 0  # questions asked, and dialogues whose loss is taken; 0: all
    every_steps: int = 0  # 0: at the end only
    answers: bool = True  # ask the questions, and count the answers that are exactly right
    loss: bool = False  # take the loss of the dialogues, as in training but without dropout
    batch_size: int = 64  # questions asked at once
    max_new_tokens: int = 32  # of an answer
    blind: bool = False  # ask the same questions about blank pictures too

    def validate(self):
        check(
            self.batch_size > 0 and self.max_new_tokens > 0,
            "eval.batch_size and eval.max_new_tokens must be positive",
        )
        check(
            self.count > 0 or not self.path.startswith("synthetic:"),
            "eval.count must be positive: synthetic pictures have no end",
        )
        check(
            not self.path or self.answers or self.loss,
            "eval.path is given, and neither eval.answers nor eval.loss: nothing would be evaluated",
        )
        check(bool(self.path) or not self.loss, "eval.loss needs held-out dialogues: give eval.path")


@dataclasses.dataclass
class TrainConfig:
    seed: int = 0  # of fresh parameters, the order of the data and dropout
    steps: int = 1000  # of the optimizer
    batch_size: int = 256  # dialogues a step, over all devices and micro-batches
    grad_accum: int = 1  # micro-batches that a step's dialogues are split into, one after the other
    loss_mean_rows: int = 0  # 0: one mean over a step's targets; n: the mean of the means over n rows each
    # what is learned: answers; preference: which of two answers is better;
    # or patches: a bare encoder names what covers each patch of synthetic pictures
    objective: str = "answers"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    # {part: directory or hub id}, of the parts image/encoders/0 and so on, and decoder;
    # others are fresh, unless init_from has them
    parts_from: dict[str, str] = dataclasses.field(default_factory=dict)
    init_from: str | None = None  # native directory, or what the original's phase 1 writes
    tokenizer: str | None = None  # directory with tokenizer.json; None: that of init_from or of the decoder
    # rows (regex, learning-rate factor or None); every parameter matches exactly one, None freezes
    train_parts: tuple[tuple[str, float | None], ...] = ()
    compute_dtype: str = "bfloat16"  # or float32; parameters are kept in float32
    # or bfloat16: what devices sum gradients of kernels in; those of biases and norms: in compute_dtype
    grad_dtype: str = "float32"
    # the kernel that computes attention: auto (what the devices can do best, printed at the start), dense,
    # splash (TPU), cudnn or triton (GPU)
    attention: str = "auto"
    # none | dots | full | offload: what is kept of a layer for its backward pass; full keeps the
    # layer's input alone, offload does so in the memory of the host
    remat: str = "none"
    # between layers of the decoder, spread the sequence over mesh.tensor, where each device would have all
    spread_sequence: bool = False
    max_bad_steps: int = 10  # steps with a NaN or infinite loss that are skipped before the run stops
    log_every: int = 10  # steps between lines of metrics
    wandb: str = ""  # project of Weights & Biases to which figures go too (pip install wandb); empty: to none
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def validate(self) -> "TrainConfig":
        """Checks the whole config and returns it. Raises ConfigError for the first thing that cannot work."""
        for section in (
            self.model,
            self.lora,
            self.preference,
            self.optimizer,
            self.data,
            self.mesh,
            self.checkpoint,
            self.eval,
        ):
            section.validate()
        for name in ("steps", "batch_size", "grad_accum", "log_every", "max_bad_steps"):
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        longest = self.model.decoder.max_length
        check(
            0 < self.data.max_length <= longest,
            f"data.max_length {self.data.max_length} is not in 1..{longest} (model.decoder.max_length)",
        )
        check(
            self.batch_size % self.grad_accum == 0,
            f"batch_size {self.batch_size} is not a multiple of grad_accum",
        )
        groups = self.loss_mean_rows >= 0 and self.batch_size % (self.loss_mean_rows or 1) == 0
        check(
            groups, f"batch_size {self.batch_size} is not a multiple of loss_mean_rows {self.loss_mean_rows}"
        )
        check(
            not (self.data.packing and self.loss_mean_rows),
            "loss_mean_rows counts dialogues by rows, of which data.packing has several in one. Choose one",
        )
        check(
            not self.checkpoint.keep_best or self.eval.every_steps > 0,
            "checkpoint.keep_best compares evaluations during the run: set eval.every_steps",
        )
        OBJECTIVES[self.objective]
        if self.attention != "auto":
            KERNELS[self.attention]
        one_of("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        one_of("grad_dtype", self.grad_dtype, ("bfloat16", "float32"))
        check(
            self.compute_dtype == "bfloat16" or self.grad_dtype == "float32",
            "grad_dtype=bfloat16 would round what compute_dtype=float32 computes. Choose one for both",
        )
        one_of("remat", self.remat, ("none", "dots", "full", "offload"))
        check(
            not self.spread_sequence or self.mesh.tensor != 1,
            "spread_sequence spreads over mesh.tensor, which is 1. Set mesh.tensor, or leave it out",
        )
        check(
            bool(self.train_parts),
            "train_parts is empty: rows (regex, learning-rate factor or None) say what is trained",
        )
        for pattern, _ in self.train_parts:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"train_parts: {pattern!r} is no regular expression: {error}") from None
        return self
