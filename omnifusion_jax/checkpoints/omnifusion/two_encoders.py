"""Reads the adapter of the published two-encoder model.

The code of this adapter was never published, so the names of its tensors are not known. Known are its kind,
projection and summation (models/adapters/mixed.py), and its sizes. A file is therefore read by the shapes of
its tensors, their order, and hints in their names. A *reading* says where each of our arrays comes from:

    {
      "image/adapter/linear/kernel": "out.weight",
      "image/adapter/mixes/0/layers/kernel": {"from": "clip_map_{0-24}.weight", "as": "[out, in]"},
      ...
    }

`{0-24}` runs through the layers. Where several readings fit, the user decides: `--assign` takes a reading as
a JSON file.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import refuse
from omnifusion_jax.checkpoints.mapping.transforms import MATRIX, SAME
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.config import AdapterConfig, ModelConfig, adapter
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx

# Parts of names that point to the first encoder, and to the second
HINTS = (("clip", "vit_l", "encoder_1", "first"), ("dino", "encoder_2", "second"))
# How tensors may hold the kernels of n layers, the likeliest form first: (the shape of one tensor, a map from
# the stack of tensors [tensors, ...] to our array [layer, in, out], whose shape it is given)
KERNELS = {
    "[out, in]": (lambda n, width, out: (out, width), lambda a, shape: a.swapaxes(1, 2)),
    "[out, layer in]": (
        lambda n, width, out: (out, n * width),
        lambda a, shape: a[0].reshape(shape[2], *shape[:2]).transpose(1, 2, 0),
    ),
    "[layer, out, in]": (lambda n, width, out: (n, out, width), lambda a, shape: a[0].swapaxes(1, 2)),
    "[layer, in, out]": (lambda n, width, out: (n, width, out), lambda a, shape: a[0]),
}
EACH = "[out, in]"  # the only form with a tensor for each layer


class Ambiguous(CheckpointError):
    """Several readings fit. They are in `readings`, the likeliest first; `config` lacks the adapter.

    `distances(views)` gives the `distance` of each; it is None if there are no encoders and no decoder.
    """

    def __init__(self, message, readings, config, distances):
        super().__init__(message)
        self.readings, self.config, self.distances = readings, config, distances


@dataclasses.dataclass(frozen=True)
class Unit:
    """A torch module's weight and bias, or a bare parameter. A run through layers has those of each layer."""

    pattern: str  # the name without .weight and .bias, with {0-24} for the number that runs through layers
    parts: dict  # "weight", "bias" or "" (a bare parameter) to the shape of one tensor
    count: int | None  # how many layers the run has; None if it is no run
    place: int  # position in the file of its first tensor, in a run of that of the lowest number

    def name(self, part: str) -> str:
        """The name of the tensor, or the pattern of the names of a run."""
        return f"{self.pattern}.{part}" if part else self.pattern


def readings(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> list[dict]:
    """The best-fitting readings of the tensors as the adapter of `config`, the likeliest first.

    `config` must have the encoders and the decoder of the adapter. Of the readings that fit the shapes, only
    those are returned with which most hints in the names agree.
    """
    found = []
    for choice in itertools.product(*families(tensors)):
        some = [unit for family in choice for unit in family]
        weights = [unit.parts.get("weight", ()) for unit in some if not unit.count]
        # The final linear map is a matrix [decoder width, adapter width]
        widths = {shape[1] for shape in weights if len(shape) == 2 and shape[0] == config.decoder.width}
        for first_state, width in itertools.product((0, 1), sorted(widths)):
            roles = [list(roles_of(unit, config, first_state, width)) for unit in some]
            for chosen in without_repeats(roles):
                if complete({path for role in chosen for path in role}):
                    found.append(score(dict(zip(chosen, some, strict=True))))
    best = max((hints for hints, _, _ in found), default=0)
    ranked = sorted(found, key=lambda row: row[:2], reverse=True)
    return [reading for hints, _, reading in ranked if hints == best]


def without_repeats(roles, taken=frozenset()):
    """Yields every way to choose one role from each list of `roles` such that no path is filled twice."""
    if not roles:
        yield ()
        return
    for role in roles[0]:
        paths = {path for path, _, _ in role}
        if not paths & taken:
            yield from ((role, *rest) for rest in without_repeats(roles[1:], taken | paths))


def divided(tensors: Mapping[str, np.ndarray], c: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors. One with the layer weights of both encoders is cut in two, `name[:25]` and `name[25:]`."""
    found = {}
    for name, a in tensors.items():
        one, other = (encoder.layers for encoder in c.image.encoders)
        # A layer weight for each hidden state: with the input of the first block, or without it
        firsts = [states for states in (one + 1, one) if a.size == states + other + states - one]
        if firsts and not name.endswith((".weight", ".bias")):
            end, weights = firsts[0], a.reshape(-1)
            found |= {f"{name}[:{end}]": weights[:end], f"{name}[{end}:]": weights[end:]}
        else:
            found[name] = a
    return found


def families(tensors):
    """Yields, for each family of tensors, the ways to read it; each way is a list of Units.

    A family is the tensors whose names differ only in numbers. It can be read as single modules, as one run
    through layers, or as a run for each encoder.
    """
    modules, groups = {}, {}
    for place, (name, a) in enumerate(tensors.items()):
        stem, _, last = name.rpartition(".")
        if not stem or last not in ("weight", "bias"):
            stem, last = name, ""
        modules.setdefault(stem, (place, {}))[1][last] = tuple(a.shape)
    for stem, (place, parts) in modules.items():
        key = re.sub(r"\d+", "{}", stem), tuple(sorted(parts.items()))
        groups.setdefault(key, []).append(([int(n) for n in re.findall(r"\d+", stem)], stem, place, parts))
    for members in groups.values():
        members.sort(key=lambda m: m[0])
        half = len(members) // 2
        numbered = [list(group) for _, group in itertools.groupby(members, lambda m: m[0][:-1])]
        splits = ([members], [members[:half], members[half:]], numbered)
        ways = [[run(part) for part in split] for split in splits]
        ways = [way for i, way in enumerate(ways) if None not in way and way not in ways[:i]]
        yield [[Unit(stem, parts, None, place) for _, stem, place, parts in members], *ways]


def run(members):
    """The members as one Unit, or None if they are not numbered without a gap."""
    if not members:
        return None
    numbers, stem, place, parts = members[0]
    last = members[-1][0]
    varying = [i for i in range(len(numbers)) if numbers[i] != last[i]]
    if len(varying) != 1:
        return None
    i = varying[0]
    low, high = numbers[i], last[i]
    if [m[0] for m in members] != [[*numbers[:i], n, *numbers[i + 1 :]] for n in range(low, high + 1)]:
        return None
    start, end = [m.span() for m in re.finditer(r"\d+", stem)][i]
    return Unit(f"{stem[:start]}{{{low}-{high}}}{stem[end:]}", parts, len(members), place)


def roles_of(unit, c, first_state, width):
    """Yields the roles that a Unit can have: tuples of (our path, its part, form of a kernel or None)."""
    shapes, count = unit.parts, unit.count
    if not count and shapes == linear_shapes(c.decoder.width, width, shapes):
        yield (("image/adapter/linear/kernel", "weight", None), ("image/adapter/linear/bias", "bias", None))
    for i, encoder in enumerate(c.image.encoders):
        path, states = f"image/adapter/mixes/{i}", encoder.layers + 1 - first_state
        for form, (shape_of, _) in KERNELS.items():
            part = "weight" if form.startswith("[out") else ""
            expected = states if form == EACH else None
            if shapes.get(part) != shape_of(states, encoder.width, width) or count != expected:
                continue
            kernel = (f"{path}/layers/kernel", part, form)
            bias = (f"{path}/layers/bias" if form == EACH else f"{path}/bias", "bias", None)
            if "bias" not in shapes:
                yield (kernel,)
            elif shapes["bias"] == (width,):
                yield (kernel, bias)
        if shapes == {"weight": (encoder.width,), "bias": (encoder.width,)} and count in (None, states):
            norm = f"{path}/layers/norm" if count else f"{path}/norm"
            yield ((f"{norm}/scale", "weight", None), (f"{norm}/bias", "bias", None))
        if list(shapes) == [""]:
            size = int(np.prod(shapes[""])) * (count or 1)
            if size == states:
                yield ((f"{path}/layers/weight", "", None),)
            if not count and shapes[""] == (states, width):
                yield ((f"{path}/layers/bias", "", None),)
            if not count and shapes[""] == (width,):
                yield ((f"{path}/bias", "", None),)


def linear_shapes(out, width, shapes):
    return {"weight": (out, width), "bias": (out,)} if "bias" in shapes else {}


def complete(taken):
    """Whether the roles make an adapter: it has kernels and norms, and both encoders have the same."""
    paths = {path for path, _, _ in taken}

    def paths_in(mix):
        prefix = f"image/adapter/mixes/{mix}/"
        return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}

    one, other = paths_in(0), paths_in(1)
    norm, biases = {"norm/scale", "layers/norm/scale"} & one, {"bias", "layers/bias"} & one
    forms = {form for _, _, form in taken if form}
    return (
        "image/adapter/linear/kernel" in paths
        and one == other
        and "layers/kernel" in one
        and len(norm) == 1
        and len(biases) < 2
        and len(forms) == 1
    )


def score(chosen):
    """(number of hints that agree minus those that do not, rank among equals, the reading).

    The rank counts the pairs of tensors that come in the order of the encoders; then the likelier form of the
    kernels decides.
    """
    hints, places, reading = 0, {}, {}
    for role, unit in chosen.items():
        for path, part, form in role:
            reading[path] = unit.name(part) if form is None else {"from": unit.name(part), "as": form}
        if named := re.match(r"image/adapter/mixes/(\d)/(.*)", role[0][0]):
            i = int(named[1])
            for j, words in enumerate(HINTS):
                if any(word in unit.pattern.lower() for word in words):
                    hints += 1 if i == j else -1
            places.setdefault(named[2], {})[i] = unit.place
    ordered = sum(pair[0] < pair[1] for pair in places.values())
    kernel_form = next(form for role in chosen for _, _, form in role if form)
    likelihood = list(KERNELS)[::-1].index(kernel_form)
    return hints, (ordered, likelihood), dict(sorted(reading.items()))


def names(source):
    """The names of the tensors of one entry of a reading."""
    pattern = source["from"] if isinstance(source, dict) else source
    found = re.search(r"\{(\d+)-(\d+)\}", pattern)
    if not found:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [f"{pattern[: found.start()]}{n}{pattern[found.end() :]}" for n in numbers]


def adapter_config(reading: dict, tensors, c: ModelConfig, where) -> AdapterConfig:
    """The AdapterConfig that a reading implies.

    Raises:
      CheckpointError: the reading has a wrong form, names unknown tensors, uses a tensor twice, or leaves out
        a tensor or a path that every adapter has.
    """
    try:
        used = [name for source in reading.values() for name in names(source)]
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{where}: a reading maps our paths to names, or for kernels to from and as ({error!r:.100})"
        ) from error
    problems = [f"{name}: the adapter's file has no such tensor" for name in used if name not in tensors]
    problems += [
        f"{name}: used {used.count(name)} times" for name in dict.fromkeys(used) if used.count(name) > 1
    ]
    problems += [f"{name}: not used" for name in tensors if name not in used]
    paths = [f"image/adapter/mixes/{i}/layers/kernel" for i in (0, 1)] + ["image/adapter/linear/kernel"]
    problems += [f"(no name) -> {path}: missing" for path in paths if path not in reading]
    for path, source in reading.items():
        if path in paths[:2] and form_of(source) not in tuple(KERNELS):
            problems.append(f"{path}: as must be one of {', '.join(KERNELS)}")
        elif path not in paths[:2] and form_of(source) is not None:
            problems.append(f"{path}: only kernels of the layers are given with as")
        if not names(source):
            problems.append(f"{path}: the reading names no tensor")
    refuse(problems, where, "cannot be assigned")
    a, states = adapter("sum"), kernel_layers(reading[paths[0]], tensors, c.image.encoders[0].width)
    a.width = int(tensors[names(reading["image/adapter/linear/kernel"])[0]].shape[1])
    mix = "image/adapter/mixes/0/"
    if f"{mix}layers/bias" in reading:
        a.bias = "layers"
    elif f"{mix}bias" in reading:
        a.bias = "one"
    else:
        a.bias = "none"
    a.shared_norm = "image/adapter/mixes/0/norm/scale" in reading
    a.first_state = c.image.encoders[0].layers + 1 - states
    return a


def form_of(source):
    return source.get("as") if isinstance(source, dict) else None


def kernel_layers(source, tensors, width):
    """How many layers the kernels of an entry of a reading have; `width` is the encoder's."""
    shapes, form = [tensors[name].shape for name in names(source)], form_of(source)
    if form == EACH:
        return len(shapes)
    if form == "[out, layer in]":
        return shapes[0][1] // width
    return shapes[0][0]


def assigned(reading: dict, tensors, c: ModelConfig, where) -> dict[str, Lazy]:
    """Our arrays by path, as a reading says. `c.image.adapter` is that of `adapter_config`.

    If no tensor holds the trained weights of the layers, they are 1.

    Raises:
      CheckpointError: paths are missing, unknown or misshapen (all are listed).
    """
    shapes, arrays, problems = shapes_of(c, "image/adapter"), {}, []
    for path, shape in shapes.items():
        if path not in reading and path.endswith("layers/weight"):
            arrays[path] = np.ones(shape, next(iter(tensors.values())).dtype)
        elif path not in reading:
            problems.append(f"(no name) -> {path}: missing")
    for path in reading.keys() - shapes.keys():
        problems.append(f"{path}: the adapter has no such array")
    for path in reading.keys() & shapes.keys():
        source, shape = reading[path], shapes[path]
        stack, form = [np.asarray(tensors[name]) for name in names(source)], form_of(source)
        wanted = KERNELS[form][0](*shape) if form else stack[0].shape
        size = sum(a.size for a in stack)
        if {a.shape for a in stack} != {wanted} or size != np.prod(shape):
            problems.append(
                f"{source} -> {path}: has shape {[list(a.shape) for a in stack[:1]]} x {len(stack)}, "
                f"{list(shape)} is needed"
            )
        elif path == "image/adapter/linear/kernel":
            arrays[path] = stack[0].T
        elif form:
            arrays[path] = KERNELS[form][1](np.stack(stack), shape)
        else:
            arrays[path] = np.stack(stack).reshape(shape)
    refuse(sorted(problems), where, "do not fit the adapter")
    origins = {path: spelled(reading.get(path, "1")) for path in arrays}
    return {path: Lazy(a.shape, a.dtype, a.__getitem__, origins[path]) for path, a in arrays.items()}


def spelled(source):
    """An entry of a reading for people to read."""
    return source if isinstance(source, str) else " ".join(filter(None, source.values()))


def table(c: ModelConfig) -> dict:
    """The conversion table with the names under which such an adapter is written.

    `readings` finds one reading of these names.
    """
    rows = {
        "linear.weight": ("image/adapter/linear/kernel", MATRIX),
        "linear.bias": ("image/adapter/linear/bias", SAME),
    }
    for i, tag in enumerate(("first", "second")):
        path = f"image/adapter/mixes/{i}"
        rows[f"{tag}_layers.{{}}.weight"] = (f"{path}/layers/kernel", MATRIX)
        rows[f"{tag}_weights"] = (f"{path}/layers/weight", SAME)
        if c.image.adapter.bias == "layers":
            rows[f"{tag}_layers.{{}}.bias"] = (f"{path}/layers/bias", SAME)
        elif c.image.adapter.bias == "one":
            rows[f"{tag}_bias"] = (f"{path}/bias", SAME)
        if c.image.adapter.shared_norm:
            norm, ours = f"{tag}_norm", f"{path}/norm"
        else:
            norm, ours = f"{tag}_norms.{{}}", f"{path}/layers/norm"
        rows |= {f"{norm}.weight": (f"{ours}/scale", SAME), f"{norm}.bias": (f"{ours}/bias", SAME)}
    return rows


def lines(reading):
    """The reading as the lines of a table: our path, and the tensors that it comes from."""
    width = max(map(len, reading))
    return [f"  {path:{width}}  {spelled(source)}" for path, source in sorted(reading.items())]


def choose(tensors, c: ModelConfig, where, arrays=None) -> dict:
    """The one reading that fits. `arrays` are those of the encoders and the decoder.

    Raises:
      Ambiguous: several readings fit.
      CheckpointError: none fits.
    """
    found = readings(tensors, c)
    if not found:
        shapes = "\n  ".join(f"{name} {list(a.shape)}" for name, a in tensors.items())
        raise CheckpointError(
            f"{where}: cannot be read as a projection-and-summation adapter of these encoders "
            f"and this decoder (one norm over all layers is not known here either):\n  {shapes}"
        )
    if len(found) == 1:
        return found[0]

    def distances(views):
        return [distance(reading, tensors, c, arrays, views) for reading in found]

    message = f"{where}: {len(found)} readings fit, the likeliest:\n" + "\n".join(lines(found[0]))
    raise Ambiguous(message, found, c, arrays and distances)


def distance(reading: dict, tensors, c: ModelConfig, arrays, views) -> float:
    """How far the adapter's output is from the decoder's token embeddings in size.

    It is the absolute logarithm of the ratio of their mean norms. A right reading gives embeddings of about
    the size that the decoder has learned to read, a wrong one most likely does not.

    `views` are those of a picture: for each of `c.image.views`, uint8[1, size, size, 3].
    """
    joins = adapter_config(reading, tensors, c, "the reading")
    c = dataclasses.replace(c, image=dataclasses.replace(c.image, adapter=joins))
    arrays = arrays | assigned(reading, tensors, c, "the reading")
    model = abstract(c)
    own = {
        path: jnp.asarray(np.asarray(a), jnp.float32)
        for path, a in arrays.items()
        if path.startswith("image/")
    }
    others = {path: a for path, a in nnx.parameters(model).items() if path not in own}
    model = nnx.with_parameters(model, own | others)
    mean_norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1).mean()
    rows = model.image(tuple(view[None] for view in views))
    embed = jnp.asarray(np.asarray(arrays["decoder/embed"]))
    return float(jnp.abs(jnp.log(mean_norm(rows) / mean_norm(embed))))
