"""Reads the adapter of the published two-encoder model, whose code, and with it the names of its tensors, were never published.

Known are its kind, projection and summation (models/adapters/mixed.py), and its sizes. So a file is read by shapes, by
the order of its tensors, and by hints in their names. A *reading* says for each of our arrays where it comes from:

    {"image/adapter/linear/kernel": "out.weight", "image/adapter/mixes/0/layers/kernel": {"from": "clip_map_{0-24}.weight", "as": "[out, in]"}, ...}

`{0-24}` runs through layers. Where several readings fit, the user decides: a reading is the JSON file that `--assign` takes.
"""

import dataclasses
import itertools
import re

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

HINTS = (
    ("clip", "vit_l", "encoder_1", "first"),
    ("dino", "encoder_2", "second"),
)  # in a name: of the first encoder, of the second
KERNELS = {  # how tensors hold kernels: the shape of one, and their stack [tensors, ...] to ours [layer, in, out]
    "[out, in]": (lambda n, width, out: (out, width), lambda a, shape: a.swapaxes(1, 2)),
    "[out, layer in]": (
        lambda n, width, out: (out, n * width),
        lambda a, shape: a[0].reshape(shape[2], *shape[:2]).transpose(1, 2, 0),
    ),
    "[layer, out, in]": (lambda n, width, out: (n, out, width), lambda a, shape: a[0].swapaxes(1, 2)),
    "[layer, in, out]": (lambda n, width, out: (n, width, out), lambda a, shape: a[0]),
}
EACH = "[out, in]"  # the only form with a tensor a layer


class Ambiguous(CheckpointError):
    """Several readings fit. They are in `readings`, the likeliest first; `config` lacks the adapter.

    `distances(views)` measures each; None where the encoders and the decoder are not there.
    """

    def __init__(self, message, readings, config, distances):
        super().__init__(message)
        self.readings, self.config, self.distances = readings, config, distances


@dataclasses.dataclass(frozen=True)
class Unit:
    """A torch module's weight and bias, or a parameter; of a run, those of every layer."""

    pattern: str  # of the name, without .weight and .bias; {0-24} for a number that runs
    parts: dict  # "weight", "bias" or "" (a parameter) -> shape of one
    count: int | None  # None: not a run
    place: int  # in the file

    def name(self, part):
        return f"{self.pattern}.{part}" if part else self.pattern


def readings(tensors, config: ModelConfig):
    """Every reading of {name: array} as the adapter of `config`, whose encoders and decoder are known; those that fit best, the likeliest first."""
    found = []
    for choice in itertools.product(*families(tensors)):
        some = [unit for family in choice for unit in family]
        matrices = [
            unit.parts["weight"] for unit in some if not unit.count and len(unit.parts.get("weight", ())) == 2
        ]
        widths = {width for out, width in matrices if out == config.decoder.width}
        for first_state, width in itertools.product((0, 1), sorted(widths)):
            roles = [list(roles_of(unit, config, first_state, width)) for unit in some]
            for chosen in without_repeats(roles):
                if complete({path for role in chosen for path in role}):
                    found.append(score(dict(zip(chosen, some, strict=True))))
    best = max((hints for hints, _, _ in found), default=0)
    return [
        reading for hints, _, reading in sorted(found, key=lambda row: row[:2], reverse=True) if hints == best
    ]


def without_repeats(roles, taken=frozenset()):
    """Every way to choose one role each so that nothing is filled twice."""
    if not roles:
        yield ()
    for role in roles[0] if roles else ():
        paths = {path for path, _, _ in role}
        if not paths & taken:
            yield from ((role, *rest) for rest in without_repeats(roles[1:], taken | paths))


def divided(tensors, c: ModelConfig):
    """The tensors; one that holds the layer weights of both encoders is two of them, `name[:25]` and `name[25:]`."""
    found = {}
    for name, a in tensors.items():
        one, other = (encoder.layers for encoder in c.image.encoders)
        halves = [first for first in (one + 1, one) if a.size == first + other + first - one]
        if halves and not name.endswith((".weight", ".bias")):
            found |= {
                f"{name}[:{halves[0]}]": a.reshape(-1)[: halves[0]],
                f"{name}[{halves[0]}:]": a.reshape(-1)[halves[0] :],
            }
        else:
            found[name] = a
    return found


def families(tensors):
    """Lists of Units, for tensors whose names differ in numbers alone, in every way: each for itself, as one run through layers, as a run for each
    encoder."""
    modules, groups = {}, {}
    for place, (name, a) in enumerate(tensors.items()):
        stem, _, last = name.rpartition(".")
        stem, last = (stem, last) if stem and last in ("weight", "bias") else (name, "")
        modules.setdefault(stem, (place, {}))[1][last] = tuple(a.shape)
    for stem, (place, parts) in modules.items():
        key = re.sub(r"\d+", "{}", stem), tuple(sorted(parts.items()))
        groups.setdefault(key, []).append(([int(n) for n in re.findall(r"\d+", stem)], stem, place, parts))
    for members in groups.values():
        members.sort(key=lambda m: m[0])
        half = len(members) // 2
        numbered = [list(group) for _, group in itertools.groupby(members, lambda m: m[0][:-1])]
        ways = [
            [run(part) for part in way] for way in ([members], [members[:half], members[half:]], numbered)
        ]
        ways = [way for i, way in enumerate(ways) if None not in way and way not in ways[:i]]
        yield [[Unit(stem, parts, None, place) for _, stem, place, parts in members], *ways]


def run(members):
    """One Unit of members numbered without a gap; None where they are not."""
    numbers, stem, place, parts = members[0] if members else ([], "", 0, {})
    varying = [i for i in range(len(numbers)) if members[0][0][i] != members[-1][0][i]]
    if len(varying) != 1:
        return None
    [i], (low, high) = varying, (members[n][0][varying[0]] for n in (0, -1))
    if [m[0] for m in members] != [[*numbers[:i], n, *numbers[i + 1 :]] for n in range(low, high + 1)]:
        return None
    spans = [m.span() for m in re.finditer(r"\d+", stem)]
    return Unit(f"{stem[: spans[i][0]]}{{{low}-{high}}}{stem[spans[i][1] :]}", parts, len(members), place)


def roles_of(unit, c, first_state, width):
    """What a Unit can be: dicts, as hashable tuples of (our path, part, form of a kernel or None)."""
    shapes, count = unit.parts, unit.count
    if not count and shapes == linear_shapes(c.decoder.width, width, shapes):
        yield (("image/adapter/linear/kernel", "weight", None), ("image/adapter/linear/bias", "bias", None))
    for i, encoder in enumerate(c.image.encoders):
        path, states = f"image/adapter/mixes/{i}", encoder.layers + 1 - first_state
        for form, (shape_of, _) in KERNELS.items():
            part = "weight" if form.startswith("[out") else ""
            kernel = (f"{path}/layers/kernel", part, form)
            if shapes.get(part) == shape_of(states, encoder.width, width) and count == (
                states if form == EACH else None
            ):
                bias = f"{path}/layers/bias" if form == EACH else f"{path}/bias"
                if shapes.get("bias", (width,)) == (width,):
                    yield (kernel, *([(bias, "bias", None)] if "bias" in shapes else []))
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
    """Whether the roles make an adapter: kernels, norms, and whatever one encoder has, the other has too."""
    paths = {path for path, _, _ in taken}
    one, other = (
        {
            p.removeprefix(f"image/adapter/mixes/{i}/")
            for p in paths
            if p.startswith(f"image/adapter/mixes/{i}/")
        }
        for i in (0, 1)
    )
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
    """(hints that agree less those that do not, pairs that come in the order of the encoders, the reading)"""
    hints, places, reading = 0, {}, {}
    for role, unit in chosen.items():
        for path, part, form in role:
            reading[path] = unit.name(part) if form is None else {"from": unit.name(part), "as": form}
        if named := re.match(r"image/adapter/mixes/(\d)/(.*)", role[0][0]):
            i = int(named[1])
            hints += sum(
                any(hint in unit.pattern.lower() for hint in HINTS[j]) * (1 if i == j else -1) for j in (0, 1)
            )
            places.setdefault(named[2], {})[i] = unit.place
    ordered = sum(pair[0] < pair[1] for pair in places.values())
    return (
        hints,
        (ordered, list(KERNELS)[::-1].index(next(form for role in chosen for _, _, form in role if form))),
        dict(sorted(reading.items())),
    )


def names(source):
    """("from" of a reading) to the names of its tensors."""
    pattern = source["from"] if isinstance(source, dict) else source
    found = re.search(r"\{(\d+)-(\d+)\}", pattern)
    if not found:
        return [pattern]
    return [
        f"{pattern[: found.start()]}{n}{pattern[found.end() :]}"
        for n in range(int(found[1]), int(found[2]) + 1)
    ]


def adapter_config(reading, tensors, c: ModelConfig, where) -> AdapterConfig:
    """The AdapterConfig that a reading implies. Raises CheckpointError for one that names unknown or unused tensors."""
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
    problems += [
        f"{path}: as must be one of {', '.join(KERNELS)}"
        for path in paths[:2]
        if path in reading and form_of(reading[path]) not in KERNELS
    ]
    refuse(problems, where, "cannot be assigned")
    a, states = adapter("sum"), kernel_layers(reading[paths[0]], tensors, c.image.encoders[0].width)
    a.width = int(tensors[names(reading["image/adapter/linear/kernel"])[0]].shape[1])
    a.bias = next(
        (
            bias
            for bias, path in (("layers", "layers/bias"), ("one", "bias"))
            if f"image/adapter/mixes/0/{path}" in reading
        ),
        "none",
    )
    a.shared_norm, a.first_state = (
        "image/adapter/mixes/0/norm/scale" in reading,
        c.image.encoders[0].layers + 1 - states,
    )
    return a


def form_of(source):
    return source.get("as") if isinstance(source, dict) else None


def kernel_layers(source, tensors, width):
    found, form = [tensors[name].shape for name in names(source)], form_of(source)
    return len(found) if form == EACH else found[0][1] // width if form == "[out, layer in]" else found[0][0]


def assigned(reading, tensors, c: ModelConfig, where):
    """Our arrays by path, as a reading says. `c.image.adapter` is that of `adapter_config`. Trained weights of layers that no tensor holds are 1.

    Raises CheckpointError: every path that is missing, unknown or misshapen.
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
        stack, form, shape = (
            [np.asarray(tensors[name]) for name in names(reading[path])],
            form_of(reading[path]),
            shapes[path],
        )
        wanted = KERNELS[form][0](*shape) if form else None
        if {a.shape for a in stack} != {wanted or stack[0].shape} or sum(a.size for a in stack) != np.prod(
            shape
        ):
            problems.append(
                f"{reading[path]} -> {path}: has shape {[list(a.shape) for a in stack[:1]]} x {len(stack)}, {list(shape)} is needed"
            )
        elif path == "image/adapter/linear/kernel":
            arrays[path] = stack[0].T
        else:
            arrays[path] = (
                KERNELS[form][1](np.stack(stack), shape) if form else np.stack(stack).reshape(shape)
            )
    refuse(sorted(problems), where, "do not fit the adapter")
    return {
        path: Lazy(a.shape, a.dtype, a.__getitem__, spelled(reading.get(path, "1")))
        for path, a in arrays.items()
    }


def spelled(source):
    return source if isinstance(source, str) else f"{source['from']} {source['as']}"


def table(c: ModelConfig):
    """Names under which such an adapter is written; `readings` finds one reading of them."""
    rows = {
        "linear.weight": ("image/adapter/linear/kernel", MATRIX),
        "linear.bias": ("image/adapter/linear/bias", SAME),
    }
    for i, tag in enumerate(("first", "second")):
        path = f"image/adapter/mixes/{i}"
        rows[f"{tag}_layers.{{}}.weight"], rows[f"{tag}_weights"] = (
            (f"{path}/layers/kernel", MATRIX),
            (f"{path}/layers/weight", SAME),
        )
        biases = {
            "layers": (f"{tag}_layers.{{}}.bias", f"{path}/layers/bias"),
            "one": (f"{tag}_bias", f"{path}/bias"),
        }
        rows |= {name: (ours, SAME) for kind, (name, ours) in biases.items() if kind == c.image.adapter.bias}
        norm, ours = (
            (f"{tag}_norm", f"{path}/norm")
            if c.image.adapter.shared_norm
            else (f"{tag}_norms.{{}}", f"{path}/layers/norm")
        )
        rows |= {f"{norm}.weight": (f"{ours}/scale", SAME), f"{norm}.bias": (f"{ours}/bias", SAME)}
    return rows


def lines(reading):
    """The reading as a table."""
    width = max(map(len, reading))
    return [f"  {path:{width}}  {spelled(source)}" for path, source in sorted(reading.items())]


def choose(tensors, c: ModelConfig, where, arrays=None):
    """The one reading that fits; `arrays` are the encoders' and the decoder's. Raises Ambiguous, or CheckpointError where none does."""
    found = readings(tensors, c)
    if not found:
        shapes = "\n  ".join(f"{name} {list(a.shape)}" for name, a in tensors.items())
        raise CheckpointError(
            f"{where}: cannot be read as a projection-and-summation adapter of these encoders and this decoder (one norm over all layers is not "
            f"known here either):\n  {shapes}"
        )
    if len(found) > 1:
        message = f"{where}: {len(found)} readings fit, the likeliest:\n" + "\n".join(lines(found[0]))
        raise Ambiguous(
            message,
            found,
            c,
            arrays and (lambda views: [distance(reading, tensors, c, arrays, views) for reading in found]),
        )
    return found[0]


def distance(reading, tensors, c: ModelConfig, arrays, views):
    """How far the adapter's output lies from the decoder's token embeddings: the log of the ratio of their mean norms, without its sign.

    `views` are those of a picture, for each of `c.image.views` uint8[1, size, size, 3]: a right reading gives embeddings of
    about the size that the decoder has learned to read, a wrong one most likely does not.
    """
    c = dataclasses.replace(
        c, image=dataclasses.replace(c.image, adapter=adapter_config(reading, tensors, c, "the reading"))
    )
    arrays = arrays | assigned(reading, tensors, c, "the reading")
    model = abstract(c)
    own = {
        path: jnp.asarray(np.asarray(a), jnp.float32)
        for path, a in arrays.items()
        if path.startswith("image/")
    }
    model = nnx.with_parameters(
        model, own | {path: a for path, a in nnx.parameters(model).items() if path not in own}
    )
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1).mean()
    rows = model.image(tuple(view[None] for view in views))
    return float(jnp.abs(jnp.log(norm(rows) / norm(jnp.asarray(np.asarray(arrays["decoder/embed"]))))))
