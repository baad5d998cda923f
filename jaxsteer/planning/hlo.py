"""What a compiled program costs on each device, counted from its HLO text with every loop taken as often as it runs.

XLA's own ``cost_analysis`` counts the body of a loop once, however often it runs; a search step is loops over problems,
micro-batches and layers, so that its FLOPs come out hundreds of times too small. Here

- FLOPs are those of matrix products (dots, and the convolutions that a TPU makes of them), two per multiply-add;
- bytes are those that instructions read from and write to the device's main memory, what is kept on the chip not
  counted, a slice counted as the slice;
- collectives are counted per kind and mesh axis, with the bytes that each device gives to them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxsteer.planning.hlotext import Computation, Instruction, Shape, integer, parse, root_of

_PERMUTE = "collective-permute"
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_FREE = frozenset(
    """
    parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id
    add-dependency opt-barrier copy-done slice-done async-start async-update async-done send recv send-done recv-done
    all-reduce-done all-gather-done collective-permute-done domain iota
    """.split()
)
"""Operations that move no bytes of their own, or whose bytes are counted elsewhere."""
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked")
_SLICES = ("dynamic-slice", "slice", "gather")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does in one run of a program."""

    flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: Mapping[tuple[str, str], tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    """(kind, axis) -> how many, bytes that each device gives, bytes that it sends (as a ring). An axis is the mesh
    axis over which the devices of a group differ, "prompts+model" where they differ over both."""
    unknown_loops: tuple[str, ...] = ()
    """Loops whose number of trips is data and was not given: counted once."""

    def __add__(self, other: Costs) -> Costs:
        merged = dict(self.collectives)
        for key, one in other.collectives.items():
            merged[key] = tuple(map(sum, zip(one, merged.get(key, (0, 0, 0)))))  # type: ignore[assignment]
        loops = tuple(dict.fromkeys(self.unknown_loops + other.unknown_loops))
        return Costs(self.flops + other.flops, self.bytes_accessed + other.bytes_accessed, merged, loops)

    def __mul__(self, times: float) -> Costs:
        scaled = {key: (n * times, b * times, s * times) for key, (n, b, s) in self.collectives.items()}
        return Costs(self.flops * times, self.bytes_accessed * times, scaled, self.unknown_loops)

    @property
    def sent(self) -> float:
        """Bytes that each device sends in collectives that are waited for: all but permutes."""
        return sum(sent for (kind, _), (_, _, sent) in self.collectives.items() if kind != _PERMUTE)

    @property
    def sent_in_rings(self) -> float:
        """Bytes that each device sends in permutes: rings into which XLA splits products run beside these."""
        return sum(sent for (kind, _), (_, _, sent) in self.collectives.items() if kind == _PERMUTE)


_Linear = tuple[int | None, int] | None


def program_costs(text: str, mesh: Mapping[str, int], trips: Sequence[int] = ()) -> Costs:
    """The costs of one run of the program whose HLO is ``text``, partitioned over ``mesh`` (axis -> size, in the order
    of its devices).

    ``trips`` says how often loops run whose number of trips is data, outermost first; those within run once.
    """
    computations, entry = parse(text)
    return _Counter(computations, dict(mesh), tuple(trips)).total(entry, 0)


class _Loop:
    """A ``while``, to find out how often it runs. Integers in it are followed through fusions and calls."""

    def __init__(self, computations: dict[str, Computation], around: Computation, loop: Instruction) -> None:
        self.computations, self.around, self.loop = computations, around, loop
        self.body = computations[loop.called["body"][0]]
        root = root_of(self.body)
        self.carried = root.operands if root.opcode == "tuple" else ()

    def trips(self) -> int | None:
        """As the compiler noted, or from a condition ``i < n`` and what the body adds to i; None where that is data."""
        if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', self.loop.attributes):
            return int(noted[1])
        inside = self.computations[self.loop.called["condition"][0]]
        root = root_of(inside)
        given: list[_Linear] = []
        while root.opcode in ("fusion", "call"):  # the comparison wrapped into a function of its own
            given = [self.linear(inside, inside[name], given) for name in root.operands]
            inside = self.called_by(root)
            root = root_of(inside)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, stop = (self.linear(inside, inside[name], given) for name in root.operands)
        if counter is None or stop is None or counter[0] is None or stop[0] is not None:
            return None
        step = self.linear(self.body, self.body[self.carried[counter[0]]], ()) if self.carried else None
        stride = step[1] if step is not None and step[0] == counter[0] and step[1] > 0 else 1
        return max(0, -(-(stop[1] - counter[1] - (self.initial(counter[0]) or 0)) // stride))

    def called_by(self, instruction: Instruction) -> Computation:
        """The computation of a fusion or a call."""
        return self.computations[(instruction.called.get("calls") or instruction.called["to_apply"])[0]]

    def initial(self, index: int) -> int | None:
        """The integer that the loop begins with at this index of its tuple, if it is known."""
        init = self.around.get(self.loop.operands[0])
        if init is None or init.opcode != "tuple":
            return None
        first = self.around[init.operands[index]]
        while first.opcode in ("copy", "bitcast") and first.operands[0] in self.around:
            first = self.around[first.operands[0]]
        return integer(first)

    def linear(self, inside: Computation, instruction: Instruction, given: Sequence[_Linear]) -> _Linear:
        """What an integer is: (None, constant), or (i, constant): so much more than the loop carries as i."""
        parts = [inside[name] for name in instruction.operands if name in inside]
        if instruction.opcode == "constant":
            return None if integer(instruction) is None else (None, integer(instruction) or 0)
        if instruction.opcode == "parameter" and int(instruction.literal) < len(given):
            return given[int(instruction.literal)]
        if instruction.opcode == "get-tuple-element" and (found := re.search(r"index=(\d+)", instruction.attributes)):
            index = int(found[1])
            same = self.carried and self.body[self.carried[index]]
            fixed = same and same.opcode == "get-tuple-element" and f"index={index}" in same.attributes
            known = self.initial(index) if fixed else None
            return (index, 0) if known is None else (None, known)
        if instruction.opcode in ("copy", "bitcast") and parts:
            return self.linear(inside, parts[0], given)
        if instruction.opcode in ("fusion", "call"):
            inner = self.called_by(instruction)
            return self.linear(inner, root_of(inner), [self.linear(inside, part, given) for part in parts])
        if instruction.opcode == "add" and len(parts) == 2:
            left, right = (self.linear(inside, part, given) for part in parts)
            if left is not None and right is not None and None in (left[0], right[0]):
                return (left[0] if right[0] is None else right[0], left[1] + right[1])
        return None


class _Counter:
    """Adds up computations, each one once."""

    def __init__(self, computations: dict[str, Computation], mesh: dict[str, int], given: tuple[int, ...]):
        self.computations, self.mesh, self.given = computations, mesh, given
        self.known: dict[tuple[str, int, bool], Costs] = {}

    def total(self, name: str, depth: int, fused: bool = False) -> Costs:
        """Everything that one run of a computation costs, within ``depth`` loops of unknown length; inside of a fusion
        nothing reaches main memory."""
        if (name, depth, fused) not in self.known:
            computation = self.computations[name]
            parts = (self._cost(computation, instruction, depth, fused) for instruction in computation.values())
            self.known[name, depth, fused] = sum(parts, Costs())
        return self.known[name, depth, fused]

    def _cost(self, computation: Computation, instruction: Instruction, depth: int, fused: bool) -> Costs:
        cost = Costs(_flops(computation, instruction), 0.0 if fused else self._bytes(computation, instruction))
        cost += self._collective(computation, instruction)
        if instruction.opcode == "while":
            trips, within = _Loop(self.computations, computation, instruction).trips(), depth
            if trips is None:
                trips, within = (*self.given, 1)[min(depth, len(self.given))], depth + 1
                cost += Costs(unknown_loops=() if depth < len(self.given) else (instruction.name,))
            cost += self.total(instruction.called["body"][0], within, fused) * trips
        elif instruction.opcode == "conditional":
            names = [name for key in instruction.called if "computation" in key for name in instruction.called[key]]
            cost += max((self.total(name, depth, fused) for name in names), key=lambda c: (c.flops, c.bytes_accessed))
        elif instruction.opcode in ("fusion", "call", "async-start"):
            for key in ("calls", "to_apply"):
                for name in instruction.called.get(key, ()):
                    cost += self.total(name, depth, fused or instruction.opcode == "fusion")
        return cost

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode in _FREE or any(target in instruction.attributes for target in _FREE_CALLS):
            return 0.0
        if instruction.opcode in ("copy-start", "slice-start"):  # (source, destination, context)
            source, destination = computation[instruction.operands[0]].shapes[0], instruction.shapes[1]
            return destination.nbytes * ((not source.on_chip) + (not destination.on_chip))
        total = _bytes_written(self.computations, computation, instruction)
        for index, name in enumerate(instruction.operands):
            if name in computation and all(not shape.on_chip for shape in computation[name].shapes):
                total += _bytes_read(self.computations, computation, instruction, index)
        return total

    def _collective(self, computation: Computation, instruction: Instruction) -> Costs:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            return Costs()
        groups = _groups(instruction.attributes, math.prod(self.mesh.values()))
        axis, size = _axis(groups, self.mesh), groups.shape[1]
        if not axis:
            return Costs()
        given = sum(shape.nbytes for name in instruction.operands for shape in computation[name].shapes)
        given *= size if kind == "all-gather" else 1
        share = {"all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0}.get(kind, (size - 1) / size)
        return Costs(collectives={(kind, axis): (1, given, given * share)})


# FLOPs


def _flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        return (
            2.0
            * math.prod(instruction.shapes[0].dims)
            * _contracted_size(computation, instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
        )
    if instruction.opcode == "custom-call" and re.search(
        r'custom_call_target="__cublas[^"]*(gemm|matmul)', instruction.attributes
    ):
        pattern = r'"lhs_contracting_dimensions":\[([\d,"]*)\]'
        return 2.0 * math.prod(instruction.shapes[0].dims) * _contracted_size(computation, instruction, pattern)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0.0


def _contracted_size(computation: Computation, instruction: Instruction, pattern: str) -> int:
    found = re.search(pattern, instruction.attributes)
    dims = computation[instruction.operands[0]].shapes[0].dims
    return math.prod(dims[int(i)] for i in re.findall(r"\d+", found[1])) if found else 1


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Two per multiply-add that meets no padding: TPUs turn batch axes of products into windows, most of which do."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.attributes
    lhs, rhs = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = [letter for letter in labels[3] if letter.isdigit()]

    def of(name: str, letter: str, default: str) -> str:
        return fields[name].split("x")[int(letter)] if name in fields else default

    pairs = 1
    for letter in spatial:
        pairs *= _valid_pairs(
            lhs[labels[1].index(letter)],
            rhs[labels[2].index(letter)],
            out[labels[3].index(letter)],
            int(of("stride", letter, "1")),
            int(of("pad", letter, "0_0").split("_")[0]),
            int(of("lhs_dilate", letter, "1")),
            int(of("rhs_dilate", letter, "1")),
        )
    batch = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batches = out[labels[3].index("b")] / (int(batch[1]) if batch else 1)
    return 2.0 * batches * out[labels[3].index("f")] * rhs[labels[2].index("i")] * pairs


@functools.cache
def _valid_pairs(size: int, window: int, out: int, stride: int, pad: int, dilated: int, spread: int) -> int:
    """Positions (output, window) along one axis that meet an element of the input and not padding."""
    at = np.arange(out)[:, None] * stride + np.arange(window) * spread - pad
    return int(((at >= 0) & (at % dilated == 0) & (at // dilated < size)).sum())


# Bytes


def _off_chip(shapes: Iterable[Shape]) -> float:
    return sum(shape.nbytes for shape in shapes if not shape.on_chip)


def _bytes_written(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction writes to main memory: of an update in place, the update."""
    if instruction.opcode == "fusion":
        inner = computations[instruction.called["calls"][0]]
        root = root_of(inner)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) == len(instruction.shapes):
            sizes = (
                min(shape.nbytes, _bytes_new(computations, inner, part))
                for shape, part in zip(instruction.shapes, parts)
                if not shape.on_chip
            )
            return sum(sizes)
    if instruction.opcode == "dynamic-update-slice" and instruction.shapes[0].on_chip is False:
        return _bytes_new(computations, computation, instruction)
    return _off_chip(instruction.shapes)


def _bytes_new(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> float:
    """Bytes of a result that are new."""
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        return computation[instruction.operands[1]].shapes[0].nbytes
    if instruction.opcode == "fusion":
        inner = computations[instruction.called["calls"][0]]
        return _bytes_new(computations, inner, root_of(inner))
    return sum(shape.nbytes for shape in instruction.shapes)


def _bytes_read(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction, index: int
) -> float:
    """Bytes that an instruction reads of its operand ``index``."""
    whole = sum(shape.nbytes for shape in computation[instruction.operands[index]].shapes)
    if instruction.opcode in _SLICES and index == 0:
        return sum(shape.nbytes for shape in instruction.shapes)
    if instruction.opcode == "dynamic-update-slice" and index == 0:
        return 0.0
    if instruction.opcode != "fusion":
        return whole
    inner = computations[instruction.called["calls"][0]]
    parameter = next(p for p in inner.values() if p.opcode == "parameter" and p.literal == str(index))
    return min(whole, _bytes_read_inside(computations, inner, parameter.name))


def _bytes_read_inside(computations: dict[str, Computation], inner: Computation, name: str) -> float:
    total = 0.0
    for user in inner.values():
        for index, operand in enumerate(user.operands):
            if operand == name:
                through = user.opcode == "bitcast"
                total += (
                    _bytes_read_inside(computations, inner, user.name)
                    if through
                    else _bytes_read(computations, inner, user, index)
                )
    return total


# Collectives


def _groups(attributes: str, devices: int) -> np.ndarray:
    """(groups, size) of the devices that take part in a collective together."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return np.asarray([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if tiles := re.search(r"replica_groups=\[([\d,]+)\]<=" + _IOTA, attributes):
        return _iota(tiles[2], tiles[3]).reshape(_numbers(tiles[1]))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        moved = re.findall(r"'([^']+)'", named[3])
        order = np.arange(math.prod(sizes.values()))
        if tiles := re.fullmatch(_IOTA, named[2] or ""):
            order = _iota(tiles[1], tiles[2])
        elif named[2]:
            order = np.asarray(_numbers(named[2]))
        if "(" not in named[3] and set(moved) <= set(sizes):
            ids = order.reshape(tuple(sizes.values()))
            ids = np.moveaxis(ids, [list(sizes).index(name) for name in moved], range(-len(moved), 0))
            return ids.reshape(-1, math.prod(sizes[name] for name in moved))
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return np.asarray([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(devices)[None]  # no groups, or groups in a form unknown here: everybody with everybody


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Numbers from 0, shaped, their axes reordered: flat."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (ids.transpose(_numbers(order)) if order else ids).ravel()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _axis(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The mesh axes over which the members of a group differ, joined by "+"."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    return "+".join(name for name, at in zip(mesh, places) if (at != at[:, :1]).any())
