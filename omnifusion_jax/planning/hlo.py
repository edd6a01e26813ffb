"""Reads the text of a compiled program: how often devices exchange what."""

import collections
import math
import re
from typing import NamedTuple

BYTES = {
    "pred": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "f64": 8,
}  # s8, u32, f8e4m3fn, ...: by their number of bits
# What a device receives at least, of an operand of one byte among n devices
RECEIVED = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")
CHANNEL = re.compile(r"channel_id=(\d+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The compiler for TPUs makes rings of products that wait for a gather, or whose results are to be summed: a
# device multiplies the piece it has while it passes on the one before. Names of their loops say which.
RINGS = {
    "windowed_dot_general_body_ag": "all-gather ring",
    "windowed_dot_general_body_rs": "reduce-scatter ring",
}
CUT = "all-reduce-scatter"  # its name for a computation that sums and keeps only what belongs to the device
# What it gathers in a sum: every device adds its piece to an array of zeros
PLACED, GATHER = "dynamic-update-slice", "all-gather by sum"
# What only brings an array to another memory, perhaps in parts that are joined there
MOVED = ("copy", "copy-start", "copy-done", "async-start", "async-done", "slice", "bitcast")
JOINED = 'custom_call_target="ConcatBitcast"'
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Operation(NamedTuple):
    """A line of a computation."""

    name: str
    type: str
    kind: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str  # a key of RECEIVED, a value of RINGS, or GATHER
    type: str  # of what it is given, such as bf16[512,4096]
    devices: int  # that exchange with each other
    times: int  # a step
    received: float  # bytes that a device receives each time, at least


def collectives(text: str) -> list[Collective]:
    """Every exchange of a compiled program, from its text; those in loops with how often these run.

    A loop whose number of rounds is not known beforehand, such as that over generated tokens, counts as one.
    An exchange that goes on behind other work is written where it starts, where it goes on and where it ends,
    with one channel: it counts once.
    """
    computations, entry = parsed(text)
    found, channels = [], set()
    for name, times in runs(computations, entry).items():
        ring = next((kind for part, kind in RINGS.items() if part in name), None)
        types = {operation.name: operation.type for operation in computations[name]}
        for operation in computations[name]:
            kind = operation.kind.removesuffix("-start")
            channel = CHANNEL.search(operation.rest)
            if kind not in RECEIVED or (channel and channel[1] in channels):
                continue
            channels.update(channel.groups() if channel else ())
            kind = "reduce-scatter" if kind == "all-reduce" and CUT in name else kind
            given, group = operands(operation, types), devices(operation.rest, text)
            size = sum(map(size_of, given))
            received = size * RECEIVED[kind](group)
            if kind == "all-reduce" and pieces(operation, computations, name):
                kind = GATHER
            found.append(Collective(ring or kind, " ".join(given), group, times, received))
    return found


def pieces(operation: Operation, computations, name: str) -> bool:
    """Whether all that a sum is given are pieces that were placed among zeros, alone or in a fusion."""
    made = {one.name: one for one in computations[name]}
    given = [origin(made[one], made, computations) for one in names(operation) if one in made]
    return bool(given) and all(kind == PLACED for kind in given)


def origin(operation: Operation, made: dict[str, Operation], computations) -> str:
    """The kind of what computed an operation's array in a computation `made`, wherever it was moved since."""
    called = CALLED.search(operation.rest)
    inside = called and computations.get((called[2] or "").lstrip("%"))
    if operation.kind == "fusion" and inside:
        return inside[-1].kind
    moves = JOINED in operation.rest or (inside[-1] if inside else operation).kind in MOVED
    before = made.get(next(iter(names(operation)), ""))
    return origin(before, made, computations) if moves and before else operation.kind


def parsed(text: str) -> tuple[dict[str, list[Operation]], str]:
    """({name of a computation: its operations}, the name of the one that is called first)."""
    computations, entry, here = {}, "", []
    for line in text.splitlines():
        if header := HEADER.match(line):
            here = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := LINE.match(line):
            here.append(Operation(*found.groups()))
    return computations, entry


def runs(computations, entry) -> dict[str, int]:
    """How often each computation runs."""
    times, waiting = collections.Counter(), [(entry, 1)]
    while waiting:
        name, n = waiting.pop()
        times[name] += n
        for operation in computations[name]:
            inner = n * rounds(operation, computations) if operation.kind == "while" else n
            for group, alone in CALLED.findall(operation.rest):
                for called in (group or alone).split(","):
                    waiting.append((called.strip().lstrip("%"), inner))
    return times


def rounds(loop: Operation, computations) -> int:
    """How often a loop runs: as the compiler says, or until its counter, from 0 on, reaches a constant."""
    if known := TRIPS.search(loop.rest):
        return int(known[1])
    condition, body = (
        {one.name: one for one in computations[re.search(rf"{part}=%?([\w.\-]+)", loop.rest)[1]]}
        for part in ("condition", "body")
    )
    *_, last = condition.values()
    if last.kind != "compare" or "direction=LT" not in last.rest:
        return 1
    counter, limit = (condition.get(name) for name in names(last))
    if counter is None or limit is None or limit.kind != "constant":
        return 1
    *_, results = body.values()
    place = int(re.search(r"index=(\d+)", counter.rest)[1])
    step = added(body.get(names(results)[place]), body)
    return -(-int(limit.rest.partition(")")[0]) // (step or 1))


def added(operation: Operation | None, body) -> int:
    """The sum of the constants that make an operation's result from what a loop is given."""
    if operation is None or operation.kind not in ("constant", "add"):
        return 0
    if operation.kind == "constant":
        return int(operation.rest.partition(")")[0])
    return sum(added(body.get(name), body) for name in names(operation))


def names(operation: Operation) -> list[str]:
    """The names of what an operation is given."""
    depth, end = 1, 0
    while depth:
        depth += {"(": 1, ")": -1}.get(operation.rest[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", operation.rest[: end - 1])


def operands(operation: Operation, types: dict[str, str]) -> list[str]:
    """The types of what an operation is given, without their layouts."""
    return [re.sub(r"\{[^}]*\}", "", types[name]) for name in names(operation) if name in types]


def size_of(type: str) -> int:
    """Bytes of an array type, or of all arrays of a tuple."""
    found = 0
    for kind, shape in ARRAY.findall(type):
        bits = re.search(r"\d+", kind)
        each = BYTES.get(kind) or (int(bits[0]) / 8 if bits else 0)
        found += each * math.prod(int(n) for n in shape.split(",") if n)
    return int(found)


def devices(attributes: str, text: str) -> int:
    """How many devices take part in an exchange with each other."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'a', or 'a':(2)4, a part of its devices
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    every = re.search(r"num_partitions=(\d+)", text)
    return int(every[1]) if every else 1
