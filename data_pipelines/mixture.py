"""Which window of which dataset is the N-th sample of training: arithmetic on (seed, N), so that resuming needs no state.

Samples come in blocks. Within a block every dataset has an exact count, by its weight, in an order that is drawn anew for every
block; of its own windows a dataset visits each once an epoch. Nothing depends on how many hosts or workers ask.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence

import numpy as np

from mimic_video.config import ConfigError, expanded_path, split_paths

BLOCK = 1024  # samples; weights are exact to one sample of it
_ROUNDS = 6
_PART = re.compile(r'(?:"([^"]+)"|([^"*][^"]*?))\s*(?:\*([^*]*))?')  # a name, which may be quoted, and a weight


@dataclasses.dataclass(frozen=True)
class Phase:
    """Weights from one step on. `weights` are shares of samples; they need not add up to one."""

    first_step: int
    weights: tuple[float, ...]


def parse_mixture(text: str, field: str) -> tuple[tuple[str, ...], tuple[Phase, ...]]:
    """Datasets and the phases of their weights, from "A", "A,B*2" or "A,B*2;10000:A*3,B".

    Parts are a dataset with a weight, 1 unless given; a phase after the first one begins with its step. A dataset that a phase
    does not name has no share in it. The name of a folder with , ; or * in it is to be written in double quotes, but for a whole
    text, or a part, that is a folder as it stands.

    Raises:
        ConfigError: naming the field and the part that is not of that form, a weight that is not positive, a dataset named twice
            in a phase, or steps that do not increase.
    """
    if _is_folder(text):
        text = f'"{text}"'
    phases: list[tuple[int, dict[str, float]]] = []
    for number, phase in enumerate(split_paths(text, ";")):
        start, colon, parts = phase.partition(":") if number else ("0", ":", phase)
        if not colon or not start.strip().isdigit() or (phases and int(start) <= phases[-1][0]):
            raise ConfigError(
                f"config field '{field}': {phase.strip()!r} does not begin with the step of a later phase, as in '10000:A,B*2'"
            )
        weights: dict[str, float] = {}
        for part in split_paths(parts):
            name, weight = _parse_part(part, field)
            if name in weights:
                raise ConfigError(f"config field '{field}' names {name!r} twice")
            weights[name] = weight
        phases.append((int(start), weights))
    names = tuple(dict.fromkeys(name for _, weights in phases for name in weights))
    return names, tuple(Phase(step, tuple(weights.get(name, 0.0) for name in names)) for step, weights in phases)


def _parse_part(part: str, field: str) -> tuple[str, float]:
    part = part.strip()
    match = _PART.fullmatch(f'"{part}"' if _is_folder(part) else part)
    try:
        value = math.nan if match is None else 1.0 if match[3] is None else float(match[3])
    except ValueError:
        value = math.nan
    if not match or not 0 < value < math.inf:
        raise ConfigError(f"config field '{field}': {part!r} is not a dataset, or a dataset*weight, weight > 0")
    return expanded_path(match[1] or match[2], f"config field '{field}'"), value


def _is_folder(text: str) -> bool:
    return os.path.isdir(os.path.expanduser(text))


def block_counts(weights: Sequence[float], block: int = BLOCK) -> np.ndarray:
    """int64 samples of each dataset in a block: shares by weight, with the largest remainders rounded up."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * block
    counts = np.floor(shares).astype(np.int64)
    largest = np.argsort(counts - shares, kind="stable")[: block - counts.sum()]
    counts[largest] += 1
    return counts


class Mixture:
    """Sample number → (dataset, window).

    Args:
        sizes: windows of each dataset.
        phases: weights; the first phase begins at step 0.
        batch_size: samples of a step, all hosts together. A later phase begins with the first whole block after its step.
        seed: 0 to 2³²−1.

    Attributes:
        phases, batch_size, seed: the arguments.

    Raises:
        ConfigError: if a dataset that has a weight has no windows.
    """

    def __init__(self, sizes: Sequence[int], phases: Sequence[Phase], batch_size: int, seed: int):
        for phase in phases:
            empty = [i for i, (size, weight) in enumerate(zip(sizes, phase.weights, strict=True)) if weight and not size]
            if empty:
                raise ConfigError(f"dataset number {empty[0] + 1} of the mixture has no windows")
        self._arguments = (sizes, phases, batch_size, seed)
        self.phases, self.batch_size, self.seed = phases, batch_size, seed
        self._counts = [block_counts(phase.weights) for phase in phases]
        self._first_blocks = [-(-phase.first_step * batch_size // BLOCK) for phase in phases]
        self._before = [np.zeros(len(sizes), np.int64)]  # samples of each dataset before each phase
        for counts, first, after in zip(self._counts, self._first_blocks, self._first_blocks[1:], strict=False):
            self._before.append(self._before[-1] + counts * (after - first))
        self._sizes = sizes
        self._block = functools.lru_cache(maxsize=64)(self._make_block)

    def __reduce__(self):
        return Mixture, self._arguments  # worker processes start without its cache

    def __getitem__(self, index: int) -> tuple[int, int]:
        datasets, windows = self._block(index // BLOCK)
        return int(datasets[index % BLOCK]), int(windows[index % BLOCK])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        phase = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        counts = self._counts[phase]
        start = self._before[phase] + counts * (block - self._first_blocks[phase])
        datasets = np.random.default_rng((self.seed, block)).permutation(np.repeat(np.arange(len(counts)), counts))
        windows = np.empty(BLOCK, np.int64)
        for dataset in np.flatnonzero(counts).tolist():
            epoch, position = np.divmod(start[dataset] + np.arange(counts[dataset]), self._sizes[dataset])
            windows[datasets == dataset] = shuffled(position, self._sizes[dataset], (self.seed, dataset), epoch)
        return datasets, windows


def shuffled(position: np.ndarray, size: int, seed: tuple[int, ...], epoch: np.ndarray) -> np.ndarray:
    """Where `position` of 0 … size−1 goes in the permutation of its epoch: a Feistel network, so no permutation is stored.

    The network permutes a power of four that is at least `size`; what leaves the range goes round again until it is inside.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(0, 2**64, _ROUNDS, np.uint64)
    result, epoch = position.astype(np.uint64), epoch.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ _mix(epoch[outside] ^ key)) & mask)
        result[outside] = left << half | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads every bit over all others (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
