"""What the training loop asks of its data; `data_pipelines.assembly.TrainingData` has it for every configuration."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mimic_video.batch import Batch
from mimic_video.embodiments import Embodiment
from mimic_video.vam import Params


class OpenData(Protocol):
    """The data of one stage. All processes of a run call the same methods in the same order."""

    def samples(self, count: int) -> Iterable[Mapping[str, np.ndarray]]:
        """At most `count` windows from all over the data, to fit a tokenizer to.

        Each has `video` uint8 (v, f, H, W, 3) and, of several cameras, `view_mask` bool (v,).
        """
        ...

    def robots(self) -> Mapping[str, Embodiment]:
        """The robots by name, with the statistics of these data. Only in stage `action`."""
        ...

    def batches(self, step: int, robots: Mapping[str, Embodiment]) -> Iterator[Batch]:
        """The batches after `step` steps, this process's rows: a function of (seed, step) alone.

        Args:
            step: 0 for the first batch.
            robots: those of the run, whose statistics normalise; none in stage `video`.
        """
        ...

    def validation(self, robots: Mapping[str, Embodiment]) -> Sequence[Batch]:
        """Fixed batches that validation errors are averaged over, this process's rows; none where validation is off.

        For action errors in raw units, with `action_scale` as in `make_action_curves`.
        """
        ...

    def state(self, step: int) -> Mapping[str, Any]:
        """Where `batches` stand after `step` steps and what they are drawn from, for JSON; kept with each checkpoint."""
        ...


class Data(Protocol):
    """Data that have not been opened."""

    def open(self, rows: Sequence[int], tokenizer: Callable[[], Params]) -> OpenData:
        """Opens all that the stage reads. What is wrong with the data is an error here, before anything of a run is written.

        Args:
            rows: numbers of the rows of every global batch that this process reads.
            tokenizer: gives the parameters of the tokenizer that the run uses; for data that hold latents of it.
        """
        ...
