"""What the notebooks beside this file need in their kernel: to run commands, to show files, to keep what was made.

The kernel has neither this package nor its JAX: here are the standard library, IPython and, where something is drawn, matplotlib.
"""

import glob
import io
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SECONDS = 60.0  # from one copy of what is kept to the next
_LEFT_OUT = ("source", "weights")  # folders of what can be fetched again, and is large
_UNFINISHED = ("tmp", "incomplete", "partial")  # in names of what orbax and we are still writing
_LOCKS = ("lock", "evaluation.lock")  # of processes of this machine

CONFIGS = {"small": "configs/quickstart.py:", "2b": "configs/small.py:colab_"}  # before the name of a stage
MODELS: dict[str, dict[str, Any]] = {
    "small": {"data.image_size": (64, 64), "data.future_frames": 12, "text.rows": 32},
    "2b": {"data.image_size": (240, 320), "data.future_frames": 16, "text.precision": "bfloat16"},
}
WINDOW = ("data.image_size", "data.future_frames", "data.video_hz")  # that weights are converted for
PUBLISHED = {
    "cosmos": "--source=nvidia/Cosmos-Predict2-2B-Video2World",
    "bridge": "--source=jonpai/mimic-video --backbone='video_backbone/v2w_bridge_*_fused.pt'",
}
ADAPTERS = {
    "lora.rank": 16,
    "lora.alpha": 16.0,
    "lora.targets": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "lora.trained": (),
}
METAWORLD: dict[str, Any] = {
    "data.video_hz": 20.0,
    "data.control_hz": 20.0,
    "data.action_horizon": 12,
    "data.action_delay": 0.0,
    "data.raw_action_dims": (),
    "data.raw_proprio_dims": (),
    "decoder.action_dim": 4,
    "decoder.proprio_dim": 4,
    "policy.execute_steps": 3,
    "evaluation.tasks": ("drawer-open-v3", "drawer-close-v3"),
    "evaluation.max_steps": 50,
}


# Commands.


def stop_at_errors(shell: Any = None) -> None:
    """From now on a command behind `!` that fails ends its cell, and with it what was to be run after it."""
    if shell is None:
        from IPython import get_ipython

        shell = get_ipython()
    run = type(shell).system

    def system(command: str) -> None:
        run(shell, command)
        if code := shell.user_ns["_exit_code"]:
            raise RuntimeError(f"the command ended with code {code}; its last lines say why")

    shell.system = system


def chip() -> str:
    """The accelerator of this machine: the name of its GPU, "TPU", or "CPU" if there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
        return names[0].strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "TPU" if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") else "CPU"


def extras(accelerator: str, *names: str) -> str:
    """What launch/setup.sh installs on a machine with that `chip`."""
    known: dict[str, list[str]] = {"CPU": [], "TPU": ["tpu"]}
    own = known.get(accelerator, ["cuda"])
    return ",".join([*own, *(name for name in names if name)])


def check(model: str, weights: str, accelerator: str) -> None:
    """Raises ValueError for a model that there is not, that the machine is too small for, or whose weights are another's."""
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; expected one of {', '.join(map(repr, MODELS))}")
    if model == "2b" and not weights:
        raise ValueError(f"weights is '', with model '2b'; expected one of {', '.join(map(repr, PUBLISHED))}, or a run directory")
    if model == "small" and weights in PUBLISHED:
        raise ValueError(f"weights is {weights!r}, of model '2b'; expected '' or a run directory, with model 'small'")
    if model == "2b" and (accelerator == "CPU" or "T4" in accelerator):
        raise ValueError(f"model is '2b' on {accelerator}; expected a TPU v5e, L4 or A100, with bfloat16 and 16 GB, or 'small'")


def flags(fields: Mapping[str, Any]) -> str:
    """Fields of an experiment as flags of a command, quoted for the shell."""
    return shlex.join(f"--config.{name}={value}" for name, value in fields.items())


def recorded(folder: str | os.PathLike, cameras: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of an experiment on a LeRobot dataset, as its meta/info.json describes it.

    Args:
        cameras: ROLE=KEY of those that are used; none for the primary one alone.
    """
    info = json.loads((pathlib.Path(folder) / "meta" / "info.json").read_text())
    width = {name: info["features"][key]["shape"][0] for name, key in (("action", "action"), ("proprio", "observation.state"))}
    return METAWORLD | {
        "data.video_hz": min(float(info["fps"]), 20.0),
        "data.control_hz": min(float(info["fps"]), 20.0),
        "data.cameras": tuple(camera.partition("=")[0] for camera in cameras) or ("primary",),
        "decoder.action_dim": width["action"],
        "decoder.proprio_dim": width["proprio"],
        "evaluation.tasks": (),  # there is no simulator
    }


# What there is to see.


def pictures(pattern: str, count: int = 4, width: int | None = None) -> None:
    """Shows the first files that a pattern matches, PNG or GIF. Raises FileNotFoundError if none does."""
    from IPython.display import Image, display

    paths = sorted(glob.glob(pattern))[:count]
    if not paths:
        raise FileNotFoundError(f"there is no {pattern}")
    for path in paths:
        display(Image(filename=path, width=width))


def curves(run: str, names: Sequence[str] = ("loss", "video_mse", "action_mse")) -> None:
    """Draws metrics of a run, in a folder or a bucket, by step; dashed on held-out episodes."""
    records = [json.loads(line) for line in read(f"{run}/metrics.jsonl").splitlines()]
    shown = [name for name in names if any(name in record for record in records)]
    figure = _figure(len(shown), 1)
    for axes, name in zip(figure.axes, shown, strict=True):
        for key, style in ((name, "-"), (f"validation_{name}", "o--")):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, ms=4, label=key.replace("_", " "))
        axes.set(xlabel="step", yscale="log")
        axes.legend(frameon=False)
    _show(figure)


def open_loop(folder: str | os.PathLike, dims: int = 4) -> None:
    """Draws the planned actions that launch/evaluate.py wrote down, beside recorded ones."""
    found = json.loads((pathlib.Path(folder) / "evaluation.json").read_text())["open_loop"]
    planned, actual = ([list(values) for values in zip(*found["example"][name], strict=True)] for name in ("planned", "recorded"))
    print(f"error of planned actions, in standard deviations: {found['rmse']:.3f}; of the first: {found['first_step_rmse']:.3f}")
    figure = _figure(min(dims, len(actual)), 1)
    for dim, axes in enumerate(figure.axes):
        axes.plot(actual[dim], "k", lw=1.2, label="recorded")
        axes.plot(planned[dim], lw=1.1, label="planned")
        axes.set(xlabel="held-out window", title=f"action {dim}")
    figure.axes[0].legend(frameon=False)
    _show(figure)


def read(path: str) -> str:
    """The text of a file in a folder, or in a bucket."""
    if not path.startswith("gs://"):
        return pathlib.Path(path).read_text()
    return subprocess.run(["gcloud", "storage", "cat", path], capture_output=True, text=True, check=True).stdout


def download(file: str | os.PathLike) -> None:
    """Sends a file to the browser; where that is not Colab's, says where it is."""
    try:
        from google.colab import files
    except ImportError:
        print(f"{file}: {pathlib.Path(file).stat().st_size / 1e6:.1f} MB")
        return
    files.download(os.fspath(file))


def _figure(columns: int, rows: int) -> Any:
    from matplotlib.figure import Figure  # without pyplot: whatever backend the notebook has

    figure = Figure(figsize=(min(4 * columns, 14), 2.6 * rows), layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    return figure


def _show(figure: Any) -> None:
    from IPython.display import Image, display

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    display(Image(data=file.getvalue()))


# Keeping.


def sign_in(keep: str) -> None:
    """Asks Colab for the Drive or the buckets of the user, if that is where things are kept."""
    if keep.startswith("/content/drive"):
        from google.colab import drive

        drive.mount("/content/drive")
    elif keep.startswith("gs://") and "google.colab" in sys.modules:
        from google.colab import auth

        auth.authenticate_user()


class Keeper:
    """Copies a folder to one that lives longer than this machine, such as Google Drive's, again and again, in a thread.

    Checkpoints and datasets are copied whole: each appears in the other folder when all of it is there. Checkpoints that training
    has removed go there, too. Nothing is copied while it is still being written.

    Args:
        work: the folder that is kept. What it lacks and the other one has is fetched first.
        keep: the other folder. None is kept if it is empty, nor if it is a bucket, where runs are themselves.
    """

    _last: "Keeper | None" = None  # which ends when its cell is run again

    def __init__(self, work: str, keep: str, seconds: float = _SECONDS):
        self._work, self._keep = pathlib.Path(work), pathlib.Path(keep) if keep and not keep.startswith("gs://") else None
        self._copying, self._end = threading.Lock(), threading.Event()
        if Keeper._last is not None:
            Keeper._last._end.set()
        Keeper._last = self
        if self._keep is None:
            return
        there = {folder.relative_to(self._work) for folder in self._work.rglob("checkpoints")}  # what they lack was removed
        missing = [part for part in _parts(self._keep) if not (self._work / part).exists() and part.parent not in there]
        fetched = sum(_copy(self._keep / part, self._work / part) for part in missing)
        print(f"{fetched} files and folders of {self._keep} fetched; {self._work} is copied there every {seconds:g} s")
        threading.Thread(target=self._repeat, args=(seconds,), daemon=True).start()

    def now(self) -> None:
        """Copies what is new."""
        if self._keep is None:
            return
        with self._copying:
            parts = list(_parts(self._work))
            for part in parts:
                if not _same(self._work / part, self._keep / part):
                    _copy(self._work / part, self._keep / part)
            for part in set(_parts(self._keep)) - set(parts):
                if part.parent.name == "checkpoints" and (self._work / part.parent).exists():
                    shutil.rmtree(self._keep / part)

    def stop(self) -> None:
        """Copies for the last time."""
        self._end.set()
        self.now()

    def _repeat(self, seconds: float) -> None:
        while not self._end.wait(seconds):
            try:
                self.now()
            except (OSError, shutil.Error) as error:  # a full Drive, or one that is away for a while
                print(f"warning: {self._work} could not be kept in {self._keep}, and will be tried again: {error}")


def _parts(folder: pathlib.Path, below: pathlib.Path = pathlib.Path()) -> Iterator[pathlib.Path]:
    """What is copied at once, relative to the folder: files, datasets, checkpoints. What a run's checkpoints need comes first."""
    if not (folder / below).is_dir():
        return
    for path in sorted((folder / below).iterdir(), key=lambda path: (path.name == "checkpoints", path.name)):
        part = below / path.name
        if any(word in part.name for word in _UNFINISHED) or part.name in _LOCKS or str(part) in _LEFT_OUT:
            continue
        dataset = part.parts[0] == "data" and len(part.parts) == 3  # data/NAME/VERSION
        if not path.is_dir() or dataset or part.name == "frozen" or below.name == "checkpoints":
            yield part
        else:
            yield from _parts(folder, part)


def _same(source: pathlib.Path, target: pathlib.Path) -> bool:
    """Whether a copy need not be made again. Folders that are copied whole do not change."""
    if not target.exists():
        return False
    one, other = source.stat(), target.stat()
    return source.is_dir() or (one.st_size, int(one.st_mtime)) == (other.st_size, int(other.st_mtime))


def _copy(source: pathlib.Path, target: pathlib.Path) -> bool:
    """Copies a file or a folder; under its name it is whole. False if it has gone meanwhile, as old checkpoints do."""
    partial = target.with_name(f"partial.{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
        else:
            shutil.copy2(source, partial)
    except (FileNotFoundError, shutil.Error):
        if source.exists():
            raise
        return False
    os.replace(partial, target)
    return True
