"""What a compiled program does, read from its text (HLO): operations, memory traffic and communication of one chip.

Loops count as often as they run, which XLA's own cost analysis does not do: it counts their bodies once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
# Splash attention's kernels, which declare no costs, and how many products of queries' by keys' size each does.
_FLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
# What moves nothing by itself: names, loops (their bodies do), and the ends of what was started before.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "async-start",
    "async-update",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    argument: str  # what stands between the parentheses: the number of a parameter, the value of a constant
    attributes: str

    def called(self, *kinds: str) -> list[str]:
        """Names of the computations that it runs."""
        return [
            name
            for kind, names in _CALLED.findall(self.attributes)
            if kind in kinds
            for name in re.findall(r"%([\w.\-]+)", names)
        ]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind over one network.

    Attributes:
        count: how often it is done.
        bytes: what every chip sends in all, by ring algorithms.
        network: "ici" within a slice, "dcn" between slices.
    """

    kind: str
    network: str
    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does.

    Attributes:
        flops: of matrix products, convolutions and splash attention.
        hbm_bytes: read from and written to the chip's memory by the program's instructions.
        collectives: by kind and network.
        unknown_loops: how many loops' lengths the text does not say; their bodies count once.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int


class Program:
    """The computations of a module, each a dict of its instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif _INSTRUCTION.match(line):
                instruction = _parse(line)
                current[instruction.name] = instruction

    def work(self, slices: int = 1) -> Work:
        """What one chip does in a run of the program, which is that of one of `slices` slices."""
        flops, moved, unknown = 0.0, 0.0, 0
        found: dict[Any, tuple[tuple[str, str], int, float]] = {}
        for instruction, name, times, fused in self._executed(self.entry, 1, False):
            computation = self.computations[name]
            flops += times * _flops(instruction, computation)
            unknown += instruction.opcode == "while" and self._trips(instruction) is None
            if not fused:
                moved += times * self._traffic(instruction, computation)
            communication = _communication(instruction, name, slices)
            if communication:
                kind, network, size = communication
                sent = _sent(kind, sum(_bytes(computation[operand].shape) for operand in instruction.operands), size)
                # Several fusions may do one collective, a part each between parts of a product, some of them in a loop.
                chain = _CHAIN.search(instruction.attributes)
                key = chain.groups() if chain else len(found)
                if key not in found or times < found[key][1]:
                    found[key] = (kind, network), times, sent
        collectives = tuple(
            Collective(
                *key,
                sum(times for other, times, _ in found.values() if other == key),
                sum(times * sent for other, times, sent in found.values() if other == key),
            )
            for key in sorted({key for key, _, _ in found.values()})
        )
        return Work(flops, moved, collectives, unknown)

    def _executed(self, name: str, times: int, fused: bool) -> Iterator[tuple[Instruction, str, int, bool]]:
        """Every instruction under a computation, with its computation, how often it runs, and whether it is part of a fusion."""
        for instruction in self.computations[name].values():
            yield instruction, name, times, fused
            repeats = (self._trips(instruction) or 1) if instruction.opcode == "while" else 1
            inside = fused or instruction.opcode == "fusion"
            for callee in instruction.called("calls", "body", "branch_computations", "called_computations"):
                yield from self._executed(callee, times * repeats, inside)
            if instruction.opcode == "call":
                for callee in instruction.called("to_apply"):
                    yield from self._executed(callee, times, fused)

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop runs; None if neither XLA nor its counter, which starts at zero, says so."""
        known = re.search(r'known_trip_count[":{ ]+n[": ]+(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]]
        compared = [i for i in self._inlined(condition) if i.opcode == "compare" and "direction=LT" in i.attributes]
        constants = [int(i.argument) for i in self._inlined(condition) if i.opcode == "constant" and i.shape[1:5] == "32[]"]
        step = self._step(loop, condition)
        return math.ceil(constants[0] / step) if len(compared) == 1 and len(constants) == 1 and step else None

    def _step(self, loop: Instruction, condition: dict[str, Instruction]) -> int | None:
        """What a loop adds to the value that its condition reads: more than one if XLA has put several iterations into one."""
        read = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        index = re.search(r"index=(\d+)", read[0].attributes) if len(read) == 1 else None
        body = self.computations[loop.called("body")[0]]
        root = next(i for i in body.values() if i.root)
        if index is None or root.opcode != "tuple":
            return None
        counter = body[root.operands[int(index[1])]]
        while counter.opcode == "copy":
            counter = body[counter.operands[0]]
        added = [int(body[name].argument) for name in counter.operands if body[name].opcode == "constant"]
        return added[0] if counter.opcode == "add" and len(added) == 1 else None

    def _inlined(self, computation: dict[str, Instruction]) -> Iterator[Instruction]:
        for instruction in computation.values():
            yield instruction
            for callee in instruction.called("calls"):
                yield from self._inlined(self.computations[callee])

    def _traffic(self, instruction: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes between memory and chip: operands and results that stand in the chip's memory, slices only where sliced."""
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0.0
        shapes = [computation[name].shape if name in computation else "" for name in instruction.operands]
        if instruction.opcode.endswith("-start"):  # its result has source and target
            return _hbm_bytes(instruction.shape)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm_bytes(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _hbm_bytes(shapes[1])
        if instruction.opcode != "fusion":
            return _hbm_bytes(instruction.shape) + sum(map(_hbm_bytes, shapes))
        callee = instruction.called("calls")[0]
        reads = sum(min(_hbm_bytes(shape), self._read(callee, number)) for number, shape in enumerate(shapes))
        return reads + min(_hbm_bytes(instruction.shape), self._written(callee))

    def _read(self, name: str, number: int) -> float:
        """How much a fusion reads of its operand: no more than slices of it, if that is all that it uses."""
        computation = self.computations[name]
        parameter = next(i for i in computation.values() if i.opcode == "parameter" and i.argument == str(number))
        names, total = {parameter.name}, 0.0
        for instruction in computation.values():
            used = [position for position, operand in enumerate(instruction.operands) if operand in names]
            if not used:
                continue
            if instruction.opcode == "bitcast":
                names.add(instruction.name)
            elif instruction.opcode in ("dynamic-slice", "slice", "gather"):
                total += _bytes(instruction.shape)
            elif instruction.opcode == "fusion":
                total += sum(self._read(instruction.called("calls")[0], position) for position in used)
            elif instruction.opcode != "dynamic-update-slice" or used != [0]:
                return math.inf
        return total

    def _written(self, name: str) -> float:
        """How much a fusion writes: no more than the update, if it is one in place."""
        computation = self.computations[name]
        root = next(i for i in computation.values() if i.root)
        while root.opcode == "bitcast":
            root = computation[root.operands[0]]
        if root.opcode == "fusion":
            return self._written(root.called("calls")[0])
        return _bytes(computation[root.operands[1]].shape) if root.opcode == "dynamic-update-slice" else math.inf


def _parse(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    assert start is not None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    argument = rest[opened + 1 : closed]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(start[2], bool(start[1]), shape, rest[:opened], operands, argument, rest[closed + 1 :])


def _closing(text: str, opened: int) -> int:
    """Where the parenthesis at `opened` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opened):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is not closed in {text[:200]}")


@functools.cache
def _arrays(shape: str) -> tuple[tuple[tuple[int, ...], float, bool], ...]:
    """(dimensions, bytes, whether it stands in the chip's main memory) of every array in a shape."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        size = tuple(int(dim) for dim in dims.split(",") if dim)
        found.append((size, math.prod(size) * bits / 8, "S(" not in layout))
    return tuple(found)


def _bytes(shape: str) -> float:
    return sum(size for _, size, _ in _arrays(shape))


def _hbm_bytes(shape: str) -> float:
    return sum(size for _, size, main in _arrays(shape) if main)


def _dims(shape: str) -> tuple[int, ...]:
    return _arrays(shape)[0][0]


def _flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        assert contracted is not None
        left = _dims(computation[instruction.operands[0]].shape)
        return 2.0 * math.prod(_dims(instruction.shape)) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, *(_dims(computation[name].shape) for name in instruction.operands))
    if instruction.opcode == "custom-call":
        products = next((number for kernel, number in _FLASH_PRODUCTS.items() if instruction.name.startswith(kernel)), 0)
        if products:
            shapes = (computation[name].shape for name in instruction.operands)
            queries, keys, *_ = (_dims(shape) for shape in shapes if re.match(r"bf16|f32", shape))
            return 2.0 * products * math.prod(queries) * keys[-2]
    return 0.0


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Two for every product of values that exist: on TPUs, batched matrix products are convolutions with much padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[3] if label.isdigit())

    def field(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    out, pairs = _dims(instruction.shape), 1
    for axis, size, stride, pad, base, dilation in zip(
        spatial,
        field("size", "1"),
        field("stride", "1"),
        field("pad", "0_0"),
        field("lhs_dilate", "1"),
        field("rhs_dilate", "1"),
        strict=True,
    ):
        places = np.arange(out[labels[3].index(axis)])[:, None] * int(stride) - int(pad.split("_")[0])
        places = places + np.arange(int(size)) * int(dilation)
        length = (left[labels[1].index(axis)] - 1) * int(base) + 1
        pairs *= int(((places >= 0) & (places < length) & (places % int(base) == 0)).sum())
    features = out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    return 2.0 * features * pairs


def _sent(kind: str, operand_bytes: float, size: int) -> float:
    """Bytes that each of `size` chips sends."""
    share = (size - 1) / size
    factors = {"all-gather": size - 1, "all-reduce": 2 * share, "collective-permute": 1, "one-to-one": 1}
    return operand_bytes * factors.get(kind, share)


def _communication(instruction: Instruction, computation: str, slices: int) -> tuple[str, str, int] | None:
    """(kind, network, how many chips take part), if the instruction is communication."""
    if instruction.opcode == "send" and (between := re.search(r'_megascale_transfer_type="(\w+)"', instruction.attributes)):
        return between[1].lower().replace("_", "-"), "dcn", slices
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    scattered = kind == "all-reduce" and computation.startswith("all-reduce-scatter")  # TPUs' name for what leaves out a part
    return "reduce-scatter" if scattered else kind, "ici", _group_size(instruction.attributes)


def _group_size(attributes: str) -> int:
    """How many devices communicate with each other; of permutations, two."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    shape = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if shape:
        return int(shape[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S+\))? \{((?:'[^']+',?)*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    raise ValueError(f"groups of devices cannot be read from {attributes[:200]}")
