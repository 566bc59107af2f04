"""Robots that one model drives: widths of their actions and proprioception, and how these are normalised.

A model that was trained on a mixture has one action width, the widest; other robots use its first dimensions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import DTypeLike

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.transforms import Normalizer, Statistics, from_json, remarks, to_json


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """One robot, or where its datasets are normalised apart, one robot as one dataset has it.

    Attributes:
        name: of the robot; "ROBOT/DATASET" where its datasets are normalised apart.
        index: its number in the model's embodiment table, the same for all datasets of a robot.
        statistics: of "action" (A, m) and "proprio" (1, p), raw units.
        raw_dims: dimensions of "action" and of "proprio" that are not normalised: 6-D rotations.
        cameras: those of the model's that the robot has.
        datasets: that it was trained on; empty for one with its own name, or none.
    """

    name: str
    index: int
    statistics: Mapping[str, Statistics]
    raw_dims: Mapping[str, tuple[int, ...]]
    cameras: tuple[str, ...] = ("primary",)
    datasets: tuple[str, ...] = ()

    @property
    def action_dim(self) -> int:
        return self.statistics["action"].mean.shape[-1]

    @property
    def proprio_dim(self) -> int:
        return self.statistics["proprio"].mean.shape[-1]

    def normalizers(self, config: ExperimentConfig) -> dict[str, Normalizer]:
        """Normalisers of "action" and "proprio" as the experiment configures them."""
        return self._normalizers(config, jnp.bfloat16 if config.compat.bfloat16_low_dim else np.float32)

    def remarks(self, config: ExperimentConfig) -> list[str]:
        """`transforms.remarks` on these normalisers, whose clamp a rounding is no part of."""
        exact = self._normalizers(config, np.float32)
        return [remark for key, normalizer in exact.items() for remark in remarks(self.statistics[key], normalizer)]

    def _normalizers(self, config: ExperimentConfig, dtype: DTypeLike) -> dict[str, Normalizer]:
        mode, clamp = config.data.normalization, config.compat.percentile_clamp
        return {
            key: Normalizer.from_statistics(entry, mode, key, self.raw_dims[key], dtype, clamp)
            for key, entry in self.statistics.items()
        }


def to_table(embodiments: Mapping[str, Embodiment]) -> list[dict[str, Any]]:
    """JSON form of a model's embodiments, in the order of their index. `from_table` inverts it exactly."""
    ordered = sorted(embodiments.values(), key=lambda embodiment: embodiment.index)
    return [
        {
            "name": e.name,
            "index": e.index,
            "datasets": list(e.datasets),
            "cameras": list(e.cameras),
            "raw_dims": {key: list(dims) for key, dims in e.raw_dims.items()},
            "statistics": to_json(e.statistics),
        }
        for e in ordered
    ]


def from_table(table: list[dict[str, Any]]) -> dict[str, Embodiment]:
    """Name → embodiment. Raises ValueError if the table is not of the form that `to_table` gives.

    Tables from when a robot was one dataset have no index but the place in the table, and no datasets.
    """
    try:
        return {
            entry["name"]: Embodiment(
                entry["name"],
                entry.get("index", place),
                from_json(entry["statistics"]),
                {key: tuple(entry["raw_dims"][key]) for key in ("action", "proprio")},
                tuple(entry.get("cameras", ("primary",))),
                tuple(entry.get("datasets", ())),
            )
            for place, entry in enumerate(table)
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a table of embodiments: {error!r}") from error


def choose(embodiments: Mapping[str, Embodiment], name: str | None) -> Embodiment:
    """The named embodiment; the only one if there is no name. Raises ConfigError, listing those there are."""
    if name is None and len(embodiments) == 1:
        return next(iter(embodiments.values()))
    if name is None or name not in embodiments:
        raise ConfigError(f"the embodiment is {name!r}; this model has {', '.join(map(repr, embodiments))}")
    return embodiments[name]


def of_dataset(embodiments: Mapping[str, Embodiment], dataset: str) -> Embodiment:
    """Whose recordings a dataset has. Raises ConfigError, listing the datasets there are."""
    found = {name: e for e in embodiments.values() for name in e.datasets or (e.name,)}
    if dataset not in found:
        raise ConfigError(f"the dataset is {dataset!r}; this model was trained on {', '.join(map(repr, found))}")
    return found[dataset]


def pad_last(values: Float[np.ndarray, "*b d"], width: int) -> Float[np.ndarray, "*b {width}"]:
    """Zeros after the last dimension up to `width`."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])
