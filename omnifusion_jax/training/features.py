"""Features made beforehand by the frozen encoders of a run: what makes them, and whether they are its own."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import TrainConfig, check, of_encoders
from omnifusion_jax.data.features import FeatureProcessor, unlike
from omnifusion_jax.data.prepared.features import FeatureShards, record_bytes
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import Stream
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import Choice, using
from omnifusion_jax.sharding import make_mesh, ways
from omnifusion_jax.tables import MODALITIES
from omnifusion_jax.training import freeze
from omnifusion_jax.training.program import build
from omnifusion_jax.training.step import batch_sharding

TOGETHER = 16  # tiles that a device encodes at a time


def encoder_arrays(config: TrainConfig, given: dict) -> dict:
    """{path: array in the compute dtype} of all encoders of a run.

    Args:
      given: arrays by path, as `run.starting_point` gives them, unread; encoders that it lacks are drawn from
        the seed, as training draws them.
    """
    dtype = jnp.dtype(config.compute_dtype)
    make = lambda seed: nnx.parameters(build(config, rngs=nnx.Rngs(seed)))
    ours = [path for path in jax.eval_shape(lambda: make(0)) if of_encoders(path, config.model.streams)]
    missing = [path for path in ours if path not in given]

    def fresh():
        arrays = make(config.seed)
        return {path: arrays[path] for path in missing}

    drawn = jax.device_get(jax.jit(fresh)()) if missing else {}
    return {path: (given[path] if path in given else drawn[path]).astype(dtype) for path in ours}


def made_by(config: TrainConfig, given: dict) -> dict:
    """What makes the features of a run's media, as `data.features` describes it; `given` as above.

    All weights of the encoders are read, one array after the other.

    Raises:
      ConfigError: an encoder is trained, or an adapter reads more of it than its features.
    """
    arrays, streams = encoder_arrays(config, given), {}
    trained = [path for path in arrays if freeze.factor(config.train_parts, path) is not None]
    check(
        not trained,
        f"features can only be made beforehand by encoders that stay as they are, and train_parts trains "
        f"{', '.join(trained[:3])}. Freeze image/encoders/.*, or train from pictures",
    )
    for name, c in config.model.streams.items():
        check_adapter(c, config.model.decoder.width)
        settings = {field.name: getattr(c, field.name) for field in dataclasses.fields(c)}
        del settings["adapter"], settings["token"]
        settings |= {"rows": c.rows, "encoders": []}
        for i, encoder in enumerate(c.encoders):
            here = {path: a for path, a in arrays.items() if path.startswith(f"{name}/encoders/{i}/")}
            told = {"weights": weights(here), "shape": [encoder.rows, encoder.width]}
            settings["encoders"].append(dataclasses.asdict(encoder.canonical()) | told)
        streams[name] = settings
    found = {"compute_dtype": config.compute_dtype, "draft": config.data.draft, "streams": streams}
    return json.loads(json.dumps(found))


def check_adapter(c, width: int):
    """Raises ConfigError unless the adapter of a stream needs no more than its encoders' features."""
    check(
        not any(encoder.budget for encoder in c.encoders),
        "features of pictures of any shape (encoder.budget) cannot be made beforehand: they would lack the "
        "shape. Train from pictures",
    )

    def embeddings():
        stream = Stream(c, width, rngs=nnx.Rngs(0))
        stream.take_features()
        return stream([jnp.zeros((1, 1, encoder.rows, encoder.width)) for encoder in c.encoders])

    jax.eval_shape(embeddings)


def weights(arrays: dict) -> str:
    """A hash of arrays by path."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(arrays):
        a = np.ascontiguousarray(arrays[path])
        found.update(f"{path} {a.dtype} {a.shape}\n".encode())
        found.update(a.reshape(-1).view(np.uint8))
    return found.hexdigest()


def same_features(config: TrainConfig, given: dict, made: dict):
    """Raises ConfigError unless features `made` so are those of a run's own encoders."""
    differ = unlike(made, made_by(config, given))
    check(
        not differ,
        "the data holds features of another encoder than the config's: "
        f"{'; '.join(differ)}. Prepare it anew with --features, or give the settings that it was made with",
    )


class Encode:
    """Runs the encoders of a stream over tiles, `together` at a time.

    Args:
      arrays: those of `encoder_arrays`, on the mesh.
    """

    def __init__(self, config: TrainConfig, name: str, arrays: dict, mesh: jax.sharding.Mesh):
        c = config.model.streams[name]
        stream = nnx.eval_shape(lambda: Stream(c, config.model.decoder.width, rngs=nnx.Rngs(0)))
        choice = Choice.of(config.attention, mesh.devices.flat[0].platform, packed=config.data.packing)
        self.mesh, self.together = mesh, TOGETHER * ways(mesh, "batch")
        self.encoders = []
        for i, encoder in enumerate(stream.encoders):
            part = f"{name}/encoders/{i}/"
            own = {path.removeprefix(part): a for path, a in arrays.items() if path.startswith(part)}
            self.encoders.append(nnx.with_parameters(encoder, own))

        @jax.jit
        def run(encoders, views):
            with using(choice):
                return [encoder(views[view]) for view, encoder in zip(stream.views, encoders, strict=True)]

        self.run = functools.partial(run, self.encoders)

    def __call__(self, views: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """The features [tiles, rows, width] of each encoder, of an array [tiles, ...] for each view."""
        count, made = len(views[0]), []
        with jax.set_mesh(self.mesh):
            for start in range(0, count, self.together):
                part = [view[start : start + self.together] for view in views]
                room = [(0, self.together - len(part[0]))]
                part = [np.pad(view, room + [(0, 0)] * (view.ndim - 1)) for view in part]
                made.append(self.run(jax.device_put(part, batch_sharding(self.mesh))))
        return [np.concatenate(parts)[:count] for parts in zip(*jax.device_get(made), strict=True)]


def feature_shards(config: TrainConfig, given: dict, max_pixels: int) -> tuple[Callable, dict]:
    """(what makes the FeatureShards that `prepare_files` takes, {argument of `planned`: value}).

    Arguments and errors as in `made_by`; larger pictures than `max_pixels` are refused.
    """
    made, mesh = made_by(config, given), make_mesh(**vars(config.mesh))
    arrays = encoder_arrays(config, given)
    placed = placements(mesh, arrays)
    arrays = {path: jax.device_put(np.asarray(a), placed[path]) for path, a in arrays.items()}
    processors, encode = {}, {}
    for name, c in config.model.streams.items():
        media = MODALITIES[name].processor.of(c, max_pixels=max_pixels, draft=config.data.draft)
        processors[name] = FeatureProcessor.of(media, made, name)
        encode[name] = Encode(config, name, arrays, mesh)
    portion = max(one.together for one in encode.values())
    make = functools.partial(FeatureShards, processors=processors, encode=encode, portion=portion)
    return make, {"features": made, "size": functools.partial(record_bytes, processors)}
