"""The programs that a plan compiles: those that run, on shapes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omnifusion_jax import sharding
from omnifusion_jax.batch import Form, assembled, shapes
from omnifusion_jax.checkpoints.joined import joined
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.config import GenerationConfig, TrainConfig, check
from omnifusion_jax.data.features import FeatureProcessor
from omnifusion_jax.data.mixture import declared_features
from omnifusion_jax.data.reading import row_room
from omnifusion_jax.inference import prompts
from omnifusion_jax.inference.engine import programs as engine
from omnifusion_jax.inference.engine.features import places
from omnifusion_jax.inference.engine.sizes import CHUNKS, most
from omnifusion_jax.inference.options import Sizes, blank
from omnifusion_jax.models import flops
from omnifusion_jax.models.answering import apart, outline
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.choice import DECODING, Choice, using
from omnifusion_jax.tables import MODALITIES, OBJECTIVES
from omnifusion_jax.training.program import make_program
from omnifusion_jax.training.step import batch_sharding


class Work(NamedTuple):
    """A program to compile, and what is known of it beforehand."""

    lower: Callable[[], jax.stages.Lowered]
    mesh: Mesh
    held: dict[str, Any]  # {kind of bytes: arrays}: what the program is given
    made: dict[str, Any]  # {kind of bytes: arrays}: what it surely makes on the way
    flops: dict[str, float]  # by part of the model, on all devices
    rows: int  # on all devices, at a time
    length: int  # tokens of a row


def train_step(config: TrainConfig, mesh: Mesh) -> Work:
    """The step of a run, on batches whose rows are full, each of one dialogue.

    Where `data.path` is a folder of features, it is the step that reads them and has no encoders.
    """
    made = declared_features(config.data)
    streams = tuple(made["streams"]) if made else ()
    program, batch = make_program(config, mesh, features=streams), batch_of(config, mesh, made)
    shares = flops.trained_shares(config.model, program.state.params, program.frozen)
    return Work(
        lower=lambda: program.step.lower(program.state, program.frozen, batch),
        mesh=mesh,
        held={
            "parameters": (program.state.params, program.frozen),
            "moments": program.state.optimizer,
            "features" if made else "pictures": batch.media,
            "tokens": batch._replace(media={}),
        },
        made={"gradients": program.state.params},
        flops=flops.step(config.model, load_of(config, batch)._replace(features=streams), shares),
        rows=len(batch.tokens) // config.grad_accum,
        length=batch.tokens.shape[1],
    )


def batch_of(config: TrainConfig, mesh: Mesh, made: dict | None = None):
    """The Batch of a run as shapes, with room for all the pictures that its rows can have.

    `made`: what made features of them, as data.features has it; None: they are pictures.
    """
    objective = OBJECTIVES[config.objective]
    check(objective.text, f"plans know what dialogues take; objective={config.objective} has none")
    rows = config.batch_size * objective.rows
    return batch_like(config, mesh, rows, config.grad_accum, made=made, extra=objective.columns)


def batch_like(config, mesh, rows, portions=1, length=None, made=None, extra=()):
    streams = config.model.streams
    processors = {name: MODALITIES[name].processor.of(c) for name, c in streams.items()}
    if made:
        processors = {name: FeatureProcessor.of(p, made, name) for name, p in processors.items()}
    tiles = {name: processors[name].tile(i) for i, name in enumerate(streams)}
    most = max(processor.room for processor in processors.values())
    tokens, usual = row_room(config.data, tiles, most)
    pools = portions * sharding.ways(mesh, "batch")
    form = Form(rows, length or tokens, pools, dict.fromkeys(tiles, usual * (rows // pools)), extra)
    spread = batch_sharding(mesh)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for shape, dtype in shapes(form, tiles)]
    return assembled(arrays, tiles, extra)


def load_of(config, batch, tokens=None) -> flops.Load:
    """What a batch is for a model when its rows are full and each is one dialogue."""
    rows, length = batch.tokens.shape
    place = np.arange(length)
    window = config.model.decoder.window
    seen = float(flops.pairs(place, np.ones_like(place), window))
    tiles = {name: math.prod(views[0].shape[:2]) for name, views in batch.media.items()}
    return flops.Load(rows * length, rows * seen, tiles)


def forward_flops(config, load):
    return {part: sum(products) for part, products in flops.forward(config.model, load).items()}


def prefill(config: TrainConfig, mesh: Mesh) -> Work:
    """The program that reads prompts of `data.max_length` positions, whose pictures are encoded already."""
    module, state = model_of(config, mesh), state_of(config, mesh)
    rows, length = len(state.pending), prompts.bucket(config.data.max_length)
    batch = batch_like(config, mesh, rows, length=length)
    alone = lambda *shape: placed(mesh, np.int32, shape, *(None,) * len(shape))
    chunk = engine.Chunk(
        None, placed(mesh, bool, (rows,), None), *[alone(rows)] * 2, *[alone(rows, length + 1)] * 3
    )
    dtype = jnp.dtype(config.compute_dtype)
    kept = []
    for name, stream in config.model.streams.items():
        tile = MODALITIES[name].processor.of(stream).tile(len(kept))
        shape = places(tile, config.model.decoder.width, dtype), tile.rows, config.model.decoder.width
        kept.append(placed(mesh, dtype, shape, None, None, None))
    load = load_of(config, batch)._replace(tiles={})
    found = forward_flops(config, load)
    found["head"] = 0.0  # scores are made of a prompt's last position, which the other program reads
    return Work(
        lower=lambda: engine.extend.lower(module, kept, state, chunk, fresh=True),
        mesh=mesh,
        held={
            "parameters": (module.decoder, module.special),
            "features": kept,
            "cache": state.cache,
            "tokens": (chunk, state._replace(cache=[])),
        },
        made={},
        flops=found,
        rows=rows,
        length=length,
    )


def decode_step(config: TrainConfig, mesh: Mesh) -> Work:
    """The program that writes answers, one token after the other; its figures are those of one token."""
    module, state, sizes = model_of(config, mesh), state_of(config, mesh), sizes_of(config)
    count, length = len(state.pending), state.cache[0][0].shape[2]
    alone = lambda a: placed(mesh, a.dtype, a.shape, *(None,) * a.ndim)
    options = jax.tree.map(alone, blank(count, sizes))
    rows = engine.Rows(*(placed(mesh, dtype, (count,), None) for dtype in (np.int32, bool, bool)))
    window = config.model.decoder.window or length
    load = flops.Load(count, count * min(length, window), {})

    def lower():
        with using(Choice.of("auto", mesh.devices.flat[0].platform, DECODING)):
            return engine.advance.lower(
                module.decoder, state, rows, options, np.int32(sizes.room), np.bool_(False), sizes
            )

    return Work(
        lower=lower,
        mesh=mesh,
        held={
            "parameters": module.decoder,
            "cache": state.cache,
            "tokens": (rows, options, state._replace(cache=[])),
        },
        made={},
        flops=forward_flops(config, load),
        rows=count,
        length=length,
    )


def state_of(config: TrainConfig, mesh: Mesh) -> engine.State:
    """The State of an engine with a slot for each dialogue of a batch, as long as one and its answer."""
    module, sizes = model_of(config, mesh), sizes_of(config)
    count = config.batch_size // config.grad_accum
    length = prompts.bucket(config.data.max_length) + sizes.room
    length = min(length, most(config.model.decoder.window, CHUNKS))
    state = jax.eval_shape(lambda d: engine.start(d, count, length, sizes), module.decoder)
    rows = lambda a, *axes: placed(mesh, a.dtype, a.shape, "batch", *(axes or (None,) * (a.ndim - 1)))
    return engine.State(
        cache=jax.tree.map(lambda a: rows(a, "kv_heads", None, None), state.cache),
        pending=rows(state.pending),
        search=jax.tree.map(rows, state.search),
        origin=rows(state.origin),
    )


def placed(mesh, dtype, shape, *axes):
    """The shape of an array that is spread by its logical axes."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(mesh, axes, shape))


def sizes_of(config) -> Sizes:
    """Capacities for answers as long as those of an evaluation."""
    generation = GenerationConfig(max_new_tokens=config.eval.max_new_tokens)
    return Sizes(config.model.decoder.vocab, prompts.bucket(generation.max_new_tokens))


def model_of(config: TrainConfig, mesh: Mesh):
    """The module as it is loaded for answers: layers in a list, maps joined, all in the compute dtype."""
    dtype = jnp.dtype(config.compute_dtype)
    stacked = {path: Lazy(a.shape, dtype, None) for path, a in nnx.parameters(abstract(config.model)).items()}
    arrays = apart(joined(config.model, stacked), Lazy.row)
    shape = lambda path, spread: jax.ShapeDtypeStruct(arrays[path].shape, dtype, sharding=spread)
    placed = {path: shape(path, spread) for path, spread in placements(mesh, arrays).items()}
    return nnx.with_parameters(outline(config.model, arrays), placed)


WHAT = {"step": train_step, "prefill": prefill, "decode": decode_step}
