"""A model and a tokenizer small enough for any test."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from omnifusion_jax.batch import Tile
from omnifusion_jax.checkpoints.joined import joined
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.config import DecoderConfig, EncoderConfig, ImageConfig, LoraConfig, ModelConfig, adapter
from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.data.layout import Layout, Prepare
from omnifusion_jax.data.pictures import Prepared
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.models import lora
from omnifusion_jax.models.encoder_presets import encoder
from omnifusion_jax.models.omnifusion import OmniFusion, abstract
from omnifusion_jax.models.patch_reader import PatchReader
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx

PROMPT = "This is a dialog with AI assistant.\n"
CORPUS = (
    PROMPT,
    "What is in the picture? A red circle and a blue square.",
    "How many circles are there? There are two circles to the left of it.",
)
VOCAB = 320
RESERVED = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"

SHAPES = {}  # by path, of every model asked for: tracing one takes a tenth of a second

# An optimizer that changes nothing and keeps the gradient it was given
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jax.numpy.zeros_like, params),
    lambda gradient, state, params=None: (jax.tree.map(jax.numpy.zeros_like, gradient), gradient),
)


def make_tokenizer(directory) -> Tokenizer:
    """Writes a Llama-like tokenizer of `VOCAB` tokens.

    Byte-pair encoding with byte fallback; unk, bos, eos = 0, 1, 2.
    """
    metaspace = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
    trained = Backend(models.BPE())
    trained.pre_tokenizer = metaspace
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=RESERVED + BYTES, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Backend(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.add_special_tokens(RESERVED)
    backend.pre_tokenizer = metaspace
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    names = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    assert backend.get_vocab_size() == VOCAB
    return Tokenizer(directory)


def model(size=96, patch=16, **settings) -> ModelConfig:
    """A model of pictures of `size` pixels, by default those of the bundled one."""
    return ModelConfig(image=ImageConfig((EncoderConfig(image_size=size, patch=patch),)), **settings)


def layout(tokenizer, max_length, size=96, patch=16, **settings) -> Layout:
    """A layout of pictures of `size` pixels, by default those of the bundled model."""
    return Layout(tokenizer, model(size, patch, **settings), max_length)


def prepare(tokenizer, max_length, size=96, patch=16, **settings) -> Prepare:
    return Prepare.of(tokenizer, model(size, patch, **settings), max_length)


def dialogue(turns, *images) -> Dialogue:
    return Dialogue("here", turns, shown(*images))


def shown(*images):
    """Pictures as the media of a Dialogue."""
    return tuple(Media("image", image) for image in images)


def tiles(*sizes, rows=1):
    """Of pictures, for batches; a size a view."""
    return {"image": Tile(0, tuple((size, size, 3) for size in sizes), np.uint8, rows)}


def picture(pixels, patch=16) -> Prepared:
    """uint8[size, size, 3] as one view."""
    rows = (len(pixels) // patch) ** 2
    return Prepared((pixels[None],), np.arange(rows, dtype=np.int32), rows)


def config(**settings) -> ModelConfig:
    """Grouped heads, a head size that is not embed / heads, a window shorter than a dialogue, 9 patches."""
    return ModelConfig(
        preset="test",
        image=ImageConfig(
            (EncoderConfig(image_size=24, patch=8, width=32, layers=3, heads=4, mlp=64),),
            adapter("transformer", heads=2, mlp=48),
        ),
        decoder=DecoderConfig(
            vocab=VOCAB,
            width=48,
            layers=3,
            heads=6,
            kv_heads=2,
            head_dim=16,
            mlp=80,
            window=9,
            rope_theta=1000.0,
            eps=1e-5,
            max_length=256,
        ),
        prompt=PROMPT,
        **settings,
    )


SECOND = EncoderConfig(
    image_size=16,
    shortest_edge=20,
    patch=8,
    width=24,
    layers=1,
    heads=2,
    mlp=40,
    class_token=False,
    pre_norm=False,
)


def shallow(**settings) -> ModelConfig:
    """`config` with one layer in the encoder and one in the decoder."""
    c = config(**settings)
    c.image.encoders[0].layers = c.decoder.layers = 1
    return c


def looking(looks) -> ModelConfig:
    """A small model of one layer each, without dropout: with "two encoders", "tiles", or "one encoder"."""
    c = shallow(image_place="mark" if looks == "one encoder" else "prefix")
    c.image.encoders[0].feature_layer = -1
    c.decoder.window, c.image.adapter.dropout = None, 0.0
    if looks == "two encoders":
        c.image.encoders, c.image.adapter = (*c.image.encoders, SECOND), adapter("sum", width=16)
    if looks == "tiles":
        c.image.fit, c.image.newline, c.image.unpad, c.image.grids = "tiles", True, True, ((1, 2),)
    c.validate()
    return c


def arrays(c: ModelConfig, *parts, seed=0, dtype=np.float32):
    """Random parameters by path; biases and norms too, so that none can be left out unnoticed."""
    rng, key = np.random.default_rng(seed), repr((c, parts))
    if key not in SHAPES:
        SHAPES[key] = shapes_of(c, *parts)
    return {
        path: (rng.normal(size=shape) * 0.15 + path.endswith("scale")).astype(dtype)
        for path, shape in SHAPES[key].items()
    }


def image(c: ModelConfig, seed=0):
    """uint8[1, size, size, 3]"""
    return np.random.default_rng(seed).integers(
        0, 256, (1, c.image.encoders[0].image_size, c.image.encoders[0].image_size, 3), np.uint8
    )


@functools.cache
def systems():
    """Shapes by path of systems that together have every kind of parameter there is; of those after the first
    only the part that is new."""
    giant, mixed = preset("omnifusion-1.1"), preset("report-sum-mistral-7b")
    giant.image.encoders = (encoder("dinov2-g-reg"),)
    mixed.image.adapter.shared_norm, mixed.image.adapter.bias = False, "one"
    qwen, resampler = preset("omnifusion-1.1"), preset("omnifusion-1.1")
    qwen.decoder.qkv_bias = qwen.decoder.qk_norm = True
    resampler.image.adapter = adapter("resampler")
    shapes = lambda c, part: {
        path: a for path, a in nnx.parameters(abstract(c)).items() if path.startswith(part)
    }

    def with_lora():
        module = OmniFusion(qwen, rngs=nnx.Rngs(0))
        lora.add_factors(module, LoraConfig(rank=64), rngs=nnx.Rngs(0))
        lora.add_scales(module, nnx.parameters(module))
        return module

    factors, beside = nnx.parameters(nnx.eval_shape(with_lora)), ("/lora_a", "/lora_b", "/kernel_scale")
    one_map = joined(qwen, {path: Lazy(a.shape, a.dtype, None) for path, a in factors.items()})
    zeros = "decoder/layers/attention/out/kernel_"
    reader = nnx.parameters(
        nnx.eval_shape(lambda: PatchReader(preset("omnifusion-tiny"), 121, rngs=nnx.Rngs(0)))
    )
    return {
        "omnifusion-1.1": shapes(preset("omnifusion-1.1"), ""),
        "dinov2-g-reg": shapes(giant, "image/encoders/"),
        "internvit-6b": shapes(preset("report-internvit-6b-mistral-7b"), "image/encoders/"),
        "llava-next": shapes(preset("llava-next-mistral-7b"), ("image/adapter/", "special/")),
        "concat": shapes(preset("report-concat-mistral-7b"), "image/adapter/"),
        "sum": shapes(preset("report-sum-mistral-7b"), ("image/adapter/", "image/encoders/1/")),
        "sum, norms apart": shapes(mixed, "image/adapter/"),
        "attention": shapes(preset("report-attention-mistral-7b"), "image/adapter/"),
        "resampler": shapes(resampler, "image/adapter/"),
        "omnilmm-12b": shapes(preset("omnilmm-12b"), ("image/encoders/", "image/adapter/")),
        "minicpm-v-2.0": shapes(preset("minicpm-v-2.0"), ""),
        "qwen": shapes(qwen, "decoder/layers/attention/"),
        "lora": {path: a for path, a in factors.items() if path.endswith(beside)},
        "joined": {path: a for path, a in one_map.items() if "/joined/" in path},
        "packed": {
            f"{zeros}zero": factors[f"{zeros}scale"],
            f"{zeros}order": jax.ShapeDtypeStruct(factors[zeros[:-1]].shape[:-1], np.int32),
            "decoder/layers/feed_forward/down/kernel_order": jax.ShapeDtypeStruct((32, 14336), np.int32),
        },
        "patches": {"head": reader["head"]},
    }


def losses(workdir):
    """The loss of each logged step of a run."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row.get("train/loss") for row in rows]
