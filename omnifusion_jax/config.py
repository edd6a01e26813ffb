"""Every setting of models, data, training and generation, as plain dataclasses.

A config file builds a `TrainConfig`, the command line changes fields (types are kept, unknown names are refused), `validate()` checks the whole.
"""

import dataclasses
import json
import math
import re
import shlex
import typing

from omnifusion_jax.errors import ConfigError
from omnifusion_jax.tables import DECODERS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and standard deviation


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class EncoderConfig:
    """A vision transformer. The defaults are CLIP's; what SigLIP, DINOv2 and InternViT do otherwise are fields."""

    image_size: int = 336  # pixels a side
    shortest_edge: int | None = None  # image.fit=crop: pixels of the shortest edge before the centre is cut out; None: image_size
    patch: int = 14  # pixels a side of a patch
    embed: int = 1024  # width
    layers: int = 24  # blocks
    heads: int = 16  # of attention
    mlp: int = 4096  # hidden width of the feed-forward part
    activation: str = "quick_gelu"  # or gelu, gelu_tanh, swiglu
    norm: str = "layer"  # or rms
    norm_order: str = "pre"  # of a block: norms before attention and feed-forward part; "post": after them
    eps: float = 1e-5  # of norms
    class_token: bool = True  # a trained token before the patches
    registers: int = 0  # tokens after the class token, without a position (arXiv 2309.16588)
    patch_bias: bool = False  # of the map from pixels
    qkv_bias: bool = True  # of queries, keys and values
    key_bias: bool = True  # false: queries and values alone have one, as in EVA-02 and Whisper
    qk_norm: bool = False  # an RMS norm of queries and keys over all heads at once
    layer_scale: bool = False  # a trained factor for every channel of what a block adds
    pre_norm: bool = True  # a norm before the first block
    post_norm: bool = True  # a norm after the last block
    position_grid: int | None = None  # patches a side that the positions were trained for; None: those of image_size
    rope_theta: float | None = None  # rotary positions by row and column: base of their wavelengths; None: there are none
    rope_grid: int | None = None  # patches a side that rotary positions count in; None: those of image_size
    position_resize: str = "bicubic"  # how they come to those of image_size: a row of nn/resize.py
    mean: tuple[float, float, float] = CLIP_MEAN  # of red, green and blue in [0, 1]: taken away from pixels
    std: tuple[float, float, float] = CLIP_STD  # by which they are then divided
    feature_layer: int = -2  # hidden state that is handed on: 0 is the input of the first block, -1 the output of the last
    feature_norm: bool = False  # the post norm is applied to features too
    keep_class_token: bool = False  # the class token is a feature row too

    @property
    def side(self):
        """Patches a side."""
        return self.image_size // self.patch

    @property
    def patches(self):
        return self.side**2

    @property
    def resized(self):
        """Whether positions come from another grid."""
        return self.grid != self.side

    @property
    def grid(self):
        """Patches a side of the position table."""
        return self.position_grid or self.side

    @property
    def positions(self):
        """Rows of the position table."""
        return self.class_token + self.grid**2

    @property
    def rows(self):
        """Feature rows an image gives."""
        return self.patches + self.keep_class_token

    @property
    def view(self):
        """How it looks at a picture: (pixels a side, pixels of the shortest edge before the crop)."""
        return self.image_size, self.shortest_edge or self.image_size

    def settled(self):
        """A copy in which nothing is said twice: None where a field has the value that None stands for."""
        edge = None if self.shortest_edge == self.image_size else self.shortest_edge
        return dataclasses.replace(self, shortest_edge=edge, position_grid=self.position_grid if self.resized else None)

    def validate(self):
        one_of("encoder.activation", self.activation, ("quick_gelu", "gelu", "gelu_tanh", "swiglu"))
        one_of("encoder.norm", self.norm, ("layer", "rms"))
        one_of("encoder.norm_order", self.norm_order, ("pre", "post"))
        rotates = self.rope_theta is None or self.embed // self.heads % 4 == 0
        check(rotates, "encoder.rope_theta needs heads of a width that 4 divides: pairs for rows and for columns")
        one_of("encoder.position_resize", self.position_resize, ("bicubic", "bicubic_antialias", "bicubic_offset"))
        check(self.image_size >= self.patch, f"encoder.image_size {self.image_size} is less than encoder.patch {self.patch}")
        check(self.embed % self.heads == 0, f"encoder.embed {self.embed} is not a multiple of encoder.heads {self.heads}")
        low, high = -self.layers - 1, self.layers
        check(low <= self.feature_layer <= high, f"encoder.feature_layer {self.feature_layer} is outside {low}..{high}")
        check(self.class_token or not self.keep_class_token, "encoder.keep_class_token needs encoder.class_token")
        check(self.post_norm or not self.feature_norm, "encoder.feature_norm needs encoder.post_norm")
        check(self.view[1] >= self.image_size, f"encoder.shortest_edge {self.shortest_edge} is less than encoder.image_size {self.image_size}")


HANDED_ON = ("feature_layer", "feature_norm", "keep_class_token")  # of an EncoderConfig: which of its features a model takes


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class AdapterConfig:
    """What turns features into token embeddings.

    One encoder: "linear"; "mlp", two layers and a GELU; "transformer", one post-norm layer, then a linear map;
    "resampler", trained queries that read the features.
    Two encoders (arXiv 2404.06212, section 3.1): "concat", both sequences one after the other through a transformer layer; "sum", a trained
    combination of all layers of both, added up; "attention", the same combinations read by trained queries.
    """

    kind: str = "transformer"  # or linear, mlp, resampler; concat, sum, attention take two encoders
    heads: int = 4  # of the transformer layer, and of attention
    mlp: int = 2048  # hidden width of "mlp" and of the transformer layer
    activation: str = "gelu"  # or gelu_tanh, of "mlp"; that of the transformer layer is ReLU
    dropout: float = 0.1  # of the transformer layer, in training only
    eps: float = 1e-5  # of norms
    init: str = "normal"  # fresh kernels: N(0, 1/fan_in), biases 0; "torch": PyTorch's defaults, biases too
    width: int | None = None  # that two encoders are brought to; None: the first one's
    bias: str = "layers"  # sum, attention: each linear map has its own; "one": their sum has; or "none"
    shared_norm: bool = True  # sum, attention: one layer norm an encoder, not one a layer
    first_state: int = 0  # sum, attention: the first hidden state of the combination; 0 is the input of the first block
    align: str = "pad"  # sum: the shorter sequence gets zeros at its end; "interpolate": its grid is brought to the longer one's
    queries: int = 576  # attention, resampler: rows that come out

    def validate(self):
        one_of("adapter.kind", self.kind, (*ONE_ENCODER, *TWO_ENCODERS))
        one_of("adapter.activation", self.activation, ("gelu", "gelu_tanh"))
        one_of("adapter.init", self.init, ("normal", "torch"))
        one_of("adapter.bias", self.bias, ("layers", "one", "none"))
        one_of("adapter.align", self.align, ("pad", "interpolate"))
        check(0 <= self.dropout < 1, f"adapter.dropout {self.dropout} is not in [0, 1)")


ONE_ENCODER, TWO_ENCODERS = ("linear", "mlp", "transformer", "resampler"), ("concat", "sum", "attention")


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class RopeScaling:
    """How Llama 3.1 stretches rotary positions: wavelengths that the first training saw in full are kept."""

    factor: float = 8.0  # by which low frequencies are divided
    low: float = 1.0  # turns over trained_length, up to which a frequency is low
    high: float = 4.0  # turns from which on it is kept
    trained_length: int = 8192  # positions of the first training


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class DecoderConfig:
    """A decoder of the families of Llama, Mistral and Qwen: grouped-query attention, rotary positions, RMSNorm, SwiGLU."""

    family: str = "mistral"  # or llama, qwen2, qwen3: what Hugging Face calls its model_type
    vocab: int = 32000  # tokens
    embed: int = 4096  # width
    layers: int = 32  # blocks
    heads: int = 32  # of queries
    kv_heads: int = 8  # of keys and values
    head_dim: int = 128  # width of a head
    mlp: int = 14336  # hidden width of the feed-forward part
    rope_theta: float = 10000.0  # base of the rotary positions' wavelengths
    rope_scaling: RopeScaling | None = None  # as Llama 3.1 has it
    eps: float = 1e-5  # of norms
    window: int | None = 4096  # positions back that a token sees; None: all
    max_length: int = 32768  # positions that it was trained for
    qkv_bias: bool = False  # of queries, keys and values
    qk_norm: bool = False  # an RMS norm of each head's queries and keys
    tied: bool = False  # the head is the table of embeddings
    embed_scale: float = 1.0  # factor of token embeddings
    residual_scale: float = 1.0  # factor of what a block adds
    logit_scale: float = 1.0  # factor of the scores

    @property
    def group(self):
        return self.heads // self.kv_heads

    def validate(self):
        DECODERS[self.family]
        check(self.heads % self.kv_heads == 0, f"decoder.heads {self.heads} is not a multiple of decoder.kv_heads {self.kv_heads}")
        check(self.head_dim % 2 == 0, f"decoder.head_dim {self.head_dim} is odd; rotary positions need pairs")


@dataclasses.dataclass
class ImageConfig:
    """How a picture comes to the square that an encoder takes."""

    # the centre; or pad: to a square, with the mean colour; squash; tiles: the whole, squashed, and then its
    # tiles (arXiv 2404.06212)
    fit: str = "crop"
    # tiles: the (rows, columns) to choose from
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    unpad: bool = False  # tiles: features of nothing but padding are left out, and the others stand in the order of the whole picture
    newline: bool = False  # tiles: a trained vector ends each row of that order

    def validate(self):
        one_of("image.fit", self.fit, ("crop", "pad", "squash", "tiles"))
        pairs = all(isinstance(g, tuple | list) and len(g) == 2 and min(g) > 0 for g in self.grids)
        check(pairs and bool(self.grids), f"image.grids {self.grids} are not pairs of (rows, columns)")


class View(typing.NamedTuple):
    """A way of looking at a picture; encoders with equal ones share its pixels."""

    size: int  # pixels a side
    edge: int  # pixels of the shortest edge before the centre is cut out
    fill: tuple[int, int, int] | None  # image.fit=pad: the colour of what is added, RGB


@dataclasses.dataclass
class ModelConfig:
    """Encoders turn an image into features, an adapter turns features into token embeddings, a decoder reads them among text."""

    preset: str = "omnifusion-1.1"  # a row of PRESETS (docs/presets.md)
    # the preset that filled the fields below; when `preset` is changed, they are filled anew
    filled_from: str = "omnifusion-1.1"
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    # of adapters that take two; its fields are those of `encoder`, and another preset brings it
    encoder2: EncoderConfig | None = None
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    layout: str = "omnifusion"  # of a dialogue in tokens: or original, text, template (docs/data.md)
    prompt: str = "This is a dialog with AI assistant.\n"  # what stands before the first turn
    user: str = "User:"  # layout "text": what marks the turns of the user
    bot: str = "AI:"  # likewise, the turns of the model
    template: str = ""  # layout "template": a chat template in Jinja, as Hugging Face has them
    image_token: str = "<image>"  # layout "template": what the template puts where a picture belongs

    @property
    def encoders(self):
        return (self.encoder,) if self.encoder2 is None else (self.encoder, self.encoder2)

    @property
    def views(self):
        """The different ways in which encoders look at a picture, in order: a picture is prepared once for each."""
        return tuple(dict.fromkeys(map(self.view, self.encoders)))

    def view(self, encoder):
        """How one of the encoders looks at a picture. What is padded has its own mean colour, as in LLaVA: 0 once normalised, to rounding."""
        fill = tuple(int(255 * mean) for mean in encoder.mean) if self.image.fit == "pad" else None
        return View(*encoder.view, fill)

    @property
    def rows(self):
        """Token embeddings that the adapter makes of a picture, or of one tile."""
        rows = [encoder.rows for encoder in self.encoders]
        return {"concat": sum(rows), "sum": max(rows), "attention": self.adapter.queries, "resampler": self.adapter.queries}.get(
            self.adapter.kind, rows[0]
        )

    @property
    def special(self):
        """Names of the trained vectors that stand in sequences, in the order in which `Batch.index` counts them."""
        return LAYOUTS[self.layout] + ("newline",) * self.image.newline

    def validate(self):
        for part in (*self.encoders, self.adapter, self.decoder, self.image):
            part.validate()
        one_of("model.layout", self.layout, LAYOUTS)
        kind, width = self.adapter.kind, self.adapter.width or self.encoder.embed
        check((kind in TWO_ENCODERS) == (self.encoder2 is not None), f"adapter.kind {kind!r} takes {1 + (kind in TWO_ENCODERS)} of the two encoders")
        check(kind in TWO_ENCODERS or self.adapter.width is None, f"adapter.width: adapter.kind {kind!r} has the encoder's width")
        width = self.decoder.embed if kind == "resampler" else width
        heads = kind in ("transformer", "concat", "attention", "resampler")
        check(not heads or width % self.adapter.heads == 0, f"the adapter's width {width} is not a multiple of adapter.heads {self.adapter.heads}")
        if kind == "resampler":
            check(math.isqrt(self.adapter.queries) ** 2 == self.adapter.queries, f"adapter.queries {self.adapter.queries} make no square grid")
            check(width % 4 == 0, f"adapter.kind 'resampler' needs a decoder.embed that 4 divides, not {width}")
            check(not self.encoder.keep_class_token, "adapter.kind 'resampler': encoder.keep_class_token has no place in the grid")
        for encoder in self.encoders:
            check(0 <= self.adapter.first_state <= encoder.layers, f"adapter.first_state {self.adapter.first_state} is not in 0..{encoder.layers}")
        square = not any(encoder.keep_class_token for encoder in self.encoders)
        check(kind != "sum" or self.adapter.align == "pad" or square, "adapter.align=interpolate: encoder.keep_class_token has no place in the grid")
        tiles = self.image.fit == "tiles"
        check(tiles or not (self.image.unpad or self.image.newline), "image.unpad and image.newline need image.fit=tiles")
        check(not tiles or kind in ONE_ENCODER, "image.fit=tiles works with one encoder")
        check(not tiles or not self.encoder.keep_class_token, "image.fit=tiles: encoder.keep_class_token has no place in the grid")
        check(bool(self.template) == (self.layout == "template"), "model.template belongs to model.layout=template, which needs one")


LAYOUTS = {  # the trained vectors of each
    "omnifusion": ("user", "bot", "soi", "eoi"),
    "original": ("user", "bot", "soi", "eoi"),  # the published loader to the letter
    "text": ("soi", "eoi"),
    "template": (),
}


@dataclasses.dataclass
class OptimizerConfig:
    name: str = "adamw"  # or adafactor
    learning_rate: float = 1e-3  # the highest; factors of train_parts come on top
    weight_decay: float = 0.0  # adamw: share of a matrix, times the learning rate, that a step takes away
    schedule: str = "cosine"  # to zero at the horizon; or constant
    warmup: float = 0.01  # share of the horizon, in which the learning rate rises from zero
    horizon: float = 1.0  # length of the schedule, in runs; at 8 the run ends after an eighth of it
    clip: float | None = 1.0  # largest global gradient norm; None: no clipping
    beta2: float = 0.999  # adamw: how slowly the mean of squared gradients forgets

    def validate(self):
        one_of("optimizer.name", self.name, ("adamw", "adafactor"))
        one_of("optimizer.schedule", self.schedule, ("cosine", "constant"))
        check(self.name == "adamw" or not self.weight_decay, "optimizer.weight_decay works with adamw only")
        check(self.learning_rate > 0, f"optimizer.learning_rate {self.learning_rate} is not positive")
        check(0 <= self.warmup < 1, f"optimizer.warmup is a share of the horizon in [0, 1), not {self.warmup}")
        check(self.horizon >= 1, f"optimizer.horizon is {self.horizon}: below 1 the rate would be 0 before the run ends")


@dataclasses.dataclass
class DataConfig:
    path: str = ""  # LLaVA JSON or JSONL, or synthetic:<kind>
    images: str = ""  # folder that image names are relative to
    num_workers: int = 0  # processes that read and lay out; 0: threads of this one
    shuffle: bool = True  # anew in every epoch, by `seed`
    on_bad_sample: str = "raise"  # or skip: left out, counted, reported; the run stops above `bad_share`
    bad_share: float = 0.01  # skip: share of the records that may be bad; one bad record always may
    # every record's text and picture header, while the step compiles, in processes of its own; or off
    check: str = "first_epoch"
    max_length: int = 2048  # tokens of a laid-out dialogue, feature slots included
    max_pixels: int = 50_000_000  # larger pictures are refused by their header

    def validate(self):
        one_of("data.on_bad_sample", self.on_bad_sample, ("raise", "skip"))
        one_of("data.check", self.check, ("first_epoch", "off"))
        check(0 <= self.bad_share <= 1, f"data.bad_share is a share of the records from 0 to 1, not {self.bad_share}")
        check(bool(self.path), "data.path is empty: give a LLaVA JSON file, --config.data.path=dialogues.json --config.data.images=FOLDER")


@dataclasses.dataclass
class MeshConfig:
    data: int = 1  # copies of the parameters
    fsdp: int = -1  # devices that a copy is spread over; -1: whatever devices remain
    tensor: int = 1  # devices that share the heads and hidden widths of the decoder

    def validate(self):
        sizes = (self.data, self.fsdp, self.tensor)
        check(sum(s == -1 for s in sizes) <= 1 and all(s == -1 or s > 0 for s in sizes), f"mesh sizes {sizes}: positive, at most one -1")


@dataclasses.dataclass
class CheckpointConfig:
    every_steps: int = 500  # how often the state of the run is saved; 0: by time alone
    every_minutes: float = 0.0  # besides; 0: by steps alone. With both 0 it is saved at the end and where the run is stopped
    keep: int = 2  # the newest so many states; while one is written there is one more
    final: str = "trained"  # parts, is what the finished run writes to WORKDIR/model; or the complete model

    def validate(self):
        check(self.every_steps >= 0 and self.every_minutes >= 0, "checkpoint.every_steps and checkpoint.every_minutes must not be negative")
        check(self.keep > 0, "checkpoint.keep must be positive")
        one_of("checkpoint.final", self.final, ("trained", "complete"))


@dataclasses.dataclass
class EvalConfig:
    path: str = ""  # questions with answers, as data.path; empty: no evaluation
    images: str = ""  # folder that image names are relative to
    count: int = 0  # questions asked; 0: all
    every_steps: int = 0  # 0: at the end only
    batch_size: int = 64  # questions asked at once
    max_new_tokens: int = 32  # of an answer
    blind: bool = False  # ask the same questions about blank pictures too

    def validate(self):
        check(self.batch_size > 0 and self.max_new_tokens > 0, "eval.batch_size and eval.max_new_tokens must be positive")
        check(self.count > 0 or not self.path.startswith("synthetic:"), "eval.count must be positive: synthetic pictures have no end")


@dataclasses.dataclass
class TrainConfig:
    seed: int = 0  # of fresh parameters, the order of the data and dropout
    steps: int = 1000  # of the optimizer
    batch_size: int = 256  # dialogues a step, over all devices and accumulation steps
    grad_accum: int = 1  # portions that a step's dialogues are taken in, one after the other
    loss_mean_rows: int = 0  # 0: one mean over a step's targets; n: the mean of the means over n rows each
    objective: str = "answers"  # or patches: a bare encoder names what covers each patch of synthetic pictures
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    encoder_from: str | None = None  # directory or hub id of a vision tower; None: fresh, unless init_from has it
    encoder2_from: str | None = None  # of the second, likewise
    decoder_from: str | None = None  # directory or hub id of a Mistral or Llama, likewise
    init_from: str | None = None  # native directory, or what the original's phase 1 writes
    tokenizer: str | None = None  # directory with tokenizer.json; None: that of init_from or decoder_from
    # rows (regex, learning-rate factor or None); every parameter matches exactly one, None freezes
    train_parts: tuple[tuple[str, float | None], ...] = ()
    compute_dtype: str = "bfloat16"  # or float32; parameters are kept in float32
    remat: str = "none"  # none | dots | full: what is kept of a decoder layer for its backward pass
    max_bad_steps: int = 10  # steps with a NaN or infinite loss that are skipped before the run stops
    log_every: int = 10  # steps between lines of metrics
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def validate(self):
        for section in (self.model, self.optimizer, self.data, self.mesh, self.checkpoint, self.eval):
            section.validate()
        for name in ("steps", "batch_size", "grad_accum", "log_every", "max_bad_steps"):
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        longest = self.model.decoder.max_length
        check(0 < self.data.max_length <= longest, f"data.max_length {self.data.max_length} is not in 1..{longest} (model.decoder.max_length)")
        check(self.batch_size % self.grad_accum == 0, f"batch_size {self.batch_size} is not a multiple of grad_accum")
        groups = self.loss_mean_rows >= 0 and self.batch_size % (self.loss_mean_rows or 1) == 0
        check(groups, f"batch_size {self.batch_size} is not a multiple of loss_mean_rows {self.loss_mean_rows}")
        one_of("objective", self.objective, ("answers", "patches"))
        one_of("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        one_of("remat", self.remat, ("none", "dots", "full"))
        check(bool(self.train_parts), "train_parts is empty: rows (regex, learning-rate factor or None) say what is trained")
        for pattern, _ in self.train_parts:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"train_parts: {pattern!r} is no regular expression: {error}") from None
        return self


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How answers are drawn. Greedy by default.

    `num_beams` > 1 is beam search with the semantics of Hugging Face's `generate`. Sampling starts with `temperature` > 0.
    """

    max_new_tokens: int = 128  # of an answer, the end of sequence included
    num_beams: int = 1  # above 1: beam search
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # sampling: so many of the likeliest tokens; 0: all
    top_p: float = 1.0  # sampling: the likeliest tokens that have this probability together
    early_stopping: bool = False  # beams: stop as soon as num_beams candidates are finished
    length_penalty: float = 1.0  # beams: score is the sum of log probabilities over length ** length_penalty
    repetition_penalty: float = 1.0  # scores of generated tokens are divided by it, negative ones multiplied; 1: off
    no_repeat_ngram_size: int = 0  # 0: off
    banned: tuple[str, ...] = ()  # strings that may not be produced, as the tokenizer cuts them
    banned_tokens: tuple[tuple[int, ...], ...] = ()  # token sequences that may not be produced
    ban_newline: bool = False  # the bare newline token, which `banned` misses where the tokenizer puts a space before a newline
    forced_eos: bool = False  # the last possible token is the end-of-sequence token
    seed: int = 0  # of sampling

    @classmethod
    def official(cls):
        """The recipe published with OmniFusion-1.1: three beams, 50 tokens, no newline, no free-standing colon."""
        return cls(
            max_new_tokens=50,
            num_beams=3,
            early_stopping=True,
            no_repeat_ngram_size=4,
            banned=("\n", "</s>", ":"),
            ban_newline=True,
            forced_eos=True,
        )

    def __post_init__(self):
        check(self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}")
        check(self.num_beams > 0, f"num_beams is {self.num_beams}")
        check(self.temperature >= 0, f"temperature is {self.temperature}")
        check(self.num_beams == 1 or self.temperature == 0, "beams are not sampled: set num_beams=1 or temperature=0")
        check(0 < self.top_p <= 1, f"top_p {self.top_p} is not in (0, 1]")
        check(self.top_k >= 0, f"top_k is {self.top_k}; 0 means all")
        check(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; 1 means off")
        check(self.no_repeat_ngram_size >= 0, f"no_repeat_ngram_size is {self.no_repeat_ngram_size}; 0 means off")
        check(0 <= self.seed < 2**32, f"seed {self.seed} is not in [0, 2**32)")


def check(condition, message):
    if not condition:
        raise ConfigError(message)


def one_of(name, value, choices):
    check(value in choices, f"{name} is {value!r}; choose from {', '.join(choices)}")


def same_settings(name, ours, theirs, source, but=()):
    """Compares a part's config with that of the checkpoint it comes from, except for the fields `but`. Raises ConfigError with all differences."""
    check(
        (ours is None) == (theirs is None),
        f"{source} has {'no' if theirs is None else 'a'} {name}, the config has {'none' if ours is None else 'one'}",
    )
    fields = [f.name for f in dataclasses.fields(ours) if f.name not in but] if ours else ()
    wrong = [f"--config.{name}.{f}={getattr(theirs, f)}" for f in fields if getattr(ours, f) != getattr(theirs, f)]
    check(not wrong, f"{source} was made with other settings than the config's {name}. To take them over: {shlex.join(wrong)}")


def variant(table, name):
    """The row of a config file's variants. Raises ConfigError naming those there are."""
    check(name in table, f"there is no variant {name!r}; choose from {', '.join(filter(None, table)) or 'none'}, or give none for the default")
    return table[name]


def to_json(config):
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)


def from_dict(cls, values):
    """Builds a (nested) config from what `dataclasses.asdict` gave. Raises ConfigError on unknown fields."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := set(values) - set(fields):
        raise ConfigError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(fields)}")
    made = {}
    for name, value in values.items():
        kinds = [kind for kind in (fields[name].type, *typing.get_args(fields[name].type)) if dataclasses.is_dataclass(kind)]
        made[name] = from_dict(kinds[0], value) if kinds and value is not None else tuples(value)
    return cls(**made)


def tuples(value):
    """JSON has lists where configs have tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
