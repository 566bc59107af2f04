"""Training metrics on disk (JSONL and TensorBoard) and on the terminal."""

import json
import os
import pathlib
from collections.abc import Mapping

from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends one record per logged step. After a resume, records of steps that will be repeated are dropped first."""

    def __init__(self, run: pathlib.Path, start_step: int):
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        kept = [record for record in read_metrics(run) if record["step"] <= start_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run: pathlib.Path) -> list[dict[str, float]]:
    """Every complete record of a run, oldest first; a last line that a kill cut short is left out."""
    path = pathlib.Path(run) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
