"""What machines of a cloud are given: the code, the experiment's file, and the buckets that it reads.

Fields of the configuration that are paths are gs://BUCKET/FOLDER there. Runs are read from the bucket; for the others a machine
mounts it as a folder.
"""

import functools
import gzip
import hashlib
import io
import pathlib
import re
import subprocess
import tarfile

from data_pipelines.mixture import parse_mixture
from data_pipelines.oxe import registry
from data_pipelines.oxe.mixtures import MIXTURES
from mimic_video.config import ConfigError, ExperimentConfig, value_at
from mimic_video.parallel.sharding import axis_sizes
from mimic_video.runs.storage import in_bucket
from sweeps.points import Job

ROOT = pathlib.Path(__file__).resolve().parents[2]  # the clone
MOUNTS = "/gcs"  # where machines have buckets
RUNS = ("backbone_run", "start_run")
FOLDERS = ("data.root", "data.latents", "text.cache", "text.model")
_DATASETS = ("data.video_dataset", "data.action_dataset")


def require_no_evaluation(job: Job) -> None:
    """Raises ConfigError for a job that TPU hosts cannot do whole."""
    if job.evaluations:
        raise ConfigError(
            f"{job.run} is to be evaluated after its training, but hosts of TPUs have no simulator; leave that out, "
            "and evaluate the finished run on another machine"
        )


def check_experiment(config: ExperimentConfig, chips: int, slices: int) -> None:
    """Raises ConfigError, naming the field, for a mesh that such machines do not have, or what they cannot read."""
    data, fsdp, _ = axis_sizes(config.mesh, chips, slices)
    if config.train.batch_size % (data * fsdp):
        raise ConfigError(
            f"config field 'train.batch_size' is {config.train.batch_size}; expected a multiple of data x fsdp, {data * fsdp}"
        )
    for field in (*RUNS, *FOLDERS):
        value = value_at(config, field)
        if value and not in_bucket(value) and field != "text.model":  # which may be a name, and need not be there
            raise ConfigError(f"config field '{field}' is {value!r}; expected gs://BUCKET/FOLDER, which hosts can read")
    field = f"data.{config.stage}_dataset"
    for name in _dataset_names(config, field):
        if not in_bucket(name) and name not in registry.names():
            raise ConfigError(
                f"config field '{field}' has {name!r}; expected gs://BUCKET/FOLDER, which hosts read, or a name of the registry"
            )
        if not in_bucket(name) and not config.data.root:
            raise ConfigError(
                f"config field 'data.root' is empty; expected gs://BUCKET/FOLDER with the dataset {name!r} of '{field}'"
            )
    if config.text.kind == "t5" and not config.text.cache and not in_bucket(config.text.model):
        raise ConfigError(
            "config field 'text.cache' is empty; expected gs://BUCKET/FOLDER that launch/precompute_text.py has filled"
        )
    if config.train.wandb_project:
        raise ConfigError(
            f"config field 'train.wandb_project' is {config.train.wandb_project!r}; expected '', as hosts have no key of it"
        )


def _dataset_names(config: ExperimentConfig, field: str) -> tuple[str, ...]:
    text = value_at(config, field)
    return parse_mixture(",".join(MIXTURES.get(text, (text,))), field)[0] if text else ()


def config_file(job: Job) -> str:
    """The argument of --config as a host has it, from its clone. Raises ConfigError if the file is not part of the code."""
    value = next(argument for argument in job.training if argument.startswith("--config=")).removeprefix("--config=")
    file, colon, argument = value.partition(":")
    path = pathlib.Path(file).resolve()
    if not path.is_relative_to(ROOT) or not _is_tracked(path):
        raise ConfigError(
            f"--config is {value!r}; expected a file of the clone {ROOT} that git knows (git add), as hosts get those"
        )
    return f"{path.relative_to(ROOT)}{colon}{argument}"


@functools.cache
def _is_tracked(path: pathlib.Path) -> bool:
    """Asked of the same file for every run of a sweep."""
    return path in tracked_files()


def tracked_files() -> list[pathlib.Path]:
    """Files of the clone that git knows and that are there, in order."""
    try:
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{ROOT} is no clone that git can read ({error}); hosts get the files that git knows") from error
    paths = [ROOT / name for name in sorted(names.decode().split("\0")) if name]
    return [path for path in paths if path.is_symlink() or path.is_file()]


def archive() -> tuple[str, bytes]:
    """A tar.gz of `tracked_files` as they are now, and its name: the same for the same contents."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = 10**9  # zip files, which pip makes of some of them, begin in 1980
        info.mode = 0o755 if info.mode & 0o100 else 0o644
        return info

    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for path in tracked_files():
            tar.add(path, str(path.relative_to(ROOT)), filter=plain)
    content = packed.getvalue()
    return hashlib.sha256(content).hexdigest()[:16], content


def arguments(job: Job) -> list[str]:
    """Arguments of launch/train.py on a host: the file of its own clone, and folders that the bucket is mounted at."""
    moved = [f"--config.{field}={value.replace('gs://', MOUNTS + '/')}" for field, value in _mounted(job.config).items()]
    mine = [f"--config={config_file(job)}" if each.startswith("--config=") else each for each in job.training]
    return [*mine, *moved]


def _mounted(config: ExperimentConfig) -> dict[str, str]:
    """Fields that name a bucket where a folder is expected, and what they are."""
    return {field: value for field in (*FOLDERS, *_DATASETS) if "gs://" in (value := value_at(config, field))}


def mounted_buckets(config: ExperimentConfig) -> list[str]:
    """Buckets that hosts have to mount."""
    return sorted({bucket for value in _mounted(config).values() for bucket in re.findall(r"gs://([^/,;*\"]+)", value)})


def extras(config: ExperimentConfig) -> str:
    """Extras of setup.py that hosts need. A cache of texts is taken to have all of them, which needs no text model."""
    reads_text = config.text.kind == "t5" and (not config.text.cache or in_bucket(config.text.model))
    return "tpu,data,gcs" + ",text" * reads_text
