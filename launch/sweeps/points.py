"""The points of a sweep: declared in an experiment's file, checked as launch/train.py would, named, each once.

    def sweep_lr():  # in the experiment's file; `sweep()` is the default one
        for rate in (1e-4, 3e-4):
            yield {"train.learning_rate": rate}

Several sweeps are multiplied: every combination of their points is one.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import config_flags

from mimic_video.config import (
    ConfigError,
    EvaluationConfig,
    ExperimentConfig,
    PolicyConfig,
    experiment_from,
    field_paths,
    to_dict,
    unknown_field_message,
    value_at,
)
from mimic_video.errors import nearest
from mimic_video.evaluation.sweep_results import Entry, short_names
from mimic_video.runs.status import Status, read_status
from mimic_video.runs.storage import read_whole, run_path

_LONGEST = 100  # characters of a point's name
_HASH = 8  # hexadecimal digits
_CLOUD_NAME = 35  # characters of a machine's name
_READ_BY_EVALUATION = ("policy.", "evaluation.")  # fields that training does not depend on


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of a sweep's values.

    Attributes:
        entry: what sweep.json says of it: its name, its values, and the folders of its run and of its evaluation. Points that
            differ in nothing but what evaluation reads share a run.
        config: the resolved experiment.
        training, evaluation: arguments that give launch/train.py and launch/evaluate.py this experiment.
    """

    entry: Entry
    config: ExperimentConfig
    training: tuple[str, ...]
    evaluation: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep and what follows it.

    Attributes:
        run: the run directory, or gs://BUCKET/FOLDER.
        name: that names of jobs and machines are made of: lower case, digits and hyphens, at most 35 characters.
        config: the experiment of its training.
        training: arguments of launch/train.py.
        evaluations: arguments of launch/evaluate.py, once for each point, by the folder that it writes to.
        evaluated: the experiment of each.
    """

    run: str
    name: str
    config: ExperimentConfig
    training: tuple[str, ...]
    evaluations: Mapping[str, tuple[str, ...]]
    evaluated: Mapping[str, ExperimentConfig]

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """A script of launch/ and its arguments, one after the other. What is done ends at once if it is started again."""
        return [("train.py", *self.training), *(("evaluate.py", *arguments) for arguments in self.evaluations.values())]


def expand(arguments: Sequence[str], names: Sequence[str] | None) -> tuple[list[Point], dict[str, str]]:
    """The points of an experiment's sweeps.

    Args:
        arguments: --config and what else sets the experiment, as launch/train.py takes them.
        names: of sweeps, `lr` for `sweep_lr`; None for `sweep` if the file has it, else for a single point.

    Returns:
        The points in order, and of each combination that is the same experiment as an earlier one, its name and that one's.

    Raises:
        ConfigError: naming the point and the field, if one cannot be trained.
    """
    points: list[Point] = []
    runs: dict[ExperimentConfig, str] = {}
    repeated: dict[str, str] = {}
    combinations = _combinations(arguments, names)
    fields = list(dict.fromkeys(field for values in combinations for field in values))
    for values in combinations:
        name, chosen = point_name(values, fields), (*arguments, *_flags(values))
        config = _checked(name, values, chosen)
        same = next((point.entry.name for point in points if point.config == config), None)
        if same is not None:
            repeated[name] = same
            continue
        trained = {field: value for field, value in values.items() if not field.startswith(_READ_BY_EVALUATION)}
        shared = all(field.startswith(_READ_BY_EVALUATION) for field in fields)
        training = dataclasses.replace(config, policy=PolicyConfig(execute_steps=1), evaluation=EvaluationConfig())
        run = runs.setdefault(training, "" if shared else point_name(trained, fields))
        out = run if trained == values else "/".join(filter(None, (run, "evaluations", name)))
        points.append(Point(Entry(name, values, run, out), config, (*arguments, *_flags(trained)), chosen))
    return points, repeated


def jobs(points: Sequence[Point], workdir: str, evaluate: bool) -> list[Job]:
    """One job for each run, in the order of their first points.

    Args:
        workdir: the folder of the sweep, or gs://BUCKET/FOLDER.
        evaluate: whether every point is evaluated after its training.

    Raises:
        ConfigError: for a point that differs in what evaluation reads, if it is not evaluated.
    """
    found: dict[str, Job] = {}
    for point in points:
        run, out = (_below(workdir, folder) for folder in (point.entry.run, point.entry.out))
        if out != run and not evaluate:
            raise ConfigError(
                f"point {point.entry.name} of the sweep sets what only evaluation reads; expected --then=evaluate, "
                "without which it is nothing but training"
            )
        job = found.get(run) or Job(run, cloud_name(run, workdir), point.config, (*point.training, f"--workdir={run}"), {}, {})
        if evaluate:
            arguments = (*point.evaluation, f"--workdir={run}", *[f"--out={out}"] * (out != run))
            evaluated = {**job.evaluated, out: point.config}
            job = dataclasses.replace(job, evaluations={**job.evaluations, out: arguments}, evaluated=evaluated)
        found[run] = job
    return list(found.values())


def remaining(job: Job) -> list[tuple[str, ...]]:
    """The commands of a job that have not finished, or have with other values of fields that may change."""
    training = read_status(run_path(job.run))
    trained = is_trained(job, training)
    train, *evaluations = job.commands
    wanted = zip(evaluations, job.evaluated.items(), strict=True)
    return [train] * (not trained) + [
        command for command, (out, config) in wanted if not (trained and _is_evaluated(run_path(out), config, training))
    ]


def is_trained(job: Job, status: Status) -> bool:
    """Whether what a run says of its training is that nothing is left, also if the experiment has more steps by now."""
    return status.state == "finished" and status.steps == job.config.train.steps


def _is_evaluated(out: epath.Path, config: ExperimentConfig, training: Status) -> bool:
    """Whether a folder has the evaluation of this experiment, made after its training ended."""
    status = read_status(out, "evaluation")
    if status.state != "finished" or status.updated < training.updated:
        return False
    found = json.loads(read_whole(out / "evaluation.json"))
    wanted = json.loads(json.dumps({"policy": to_dict(config.policy), "evaluation": to_dict(config.evaluation)}))
    return all(found.get(name) == value for name, value in wanted.items())


def point_name(values: Mapping[str, Any], fields: Sequence[str]) -> str:
    """What a point is called: `learning_rate=0.0001,seed=1`, which is also its folder.

    Fields go by their last names where these tell them apart. What a folder cannot be called is replaced, and a name that is
    too long, or lost something so, ends in the hash of all values.

    Args:
        fields: that any point of the sweep sets.
    """
    parts, names = [], short_names(fields)
    for field, value in values.items():
        text = "+".join(map(str, value)) if isinstance(value, list | tuple) else value
        parts.append(f"{names[field]}={text}")
    full = ",".join(parts) or "base"
    name = re.sub(r"[^\w.,=+-]", "_", full)
    if name == full and len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - _HASH - 1]}-{_digest(repr(sorted(values.items())))}"


def cloud_name(run: str, workdir: str) -> str:
    """The name of a run's machine or job: the sweep's, and a hash of the run's whole path."""
    sweep = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    sweep = re.sub(r"^[^a-z]+", "", sweep) or "sweep"
    return f"{sweep[: _CLOUD_NAME - _HASH - 1].rstrip('-')}-{_digest(run)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH]


def _below(workdir: str, folder: str) -> str:
    return f"{workdir.rstrip('/')}/{folder}" if folder else workdir.rstrip("/")


def _combinations(arguments: Sequence[str], names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The values of every combination of points of the named sweeps."""
    file = next(argument for argument in arguments if argument.startswith("--config=")).removeprefix("--config=").split(":")[0]
    module = _module(pathlib.Path(file))
    declared = {name.removeprefix("sweep").removeprefix("_"): value for name, value in vars(module).items() if _is_sweep(name)}
    if names is None:
        names = [""] if "" in declared else []
    for name in names:
        if name not in declared:
            known = [known for known in declared if known]
            hint = f"did you mean {nearest(name, known)!r}?" if known else f"{file} declares no sweep_NAME()"
            raise ConfigError(f"--sweep names {name!r}, but there is no sweep_{name}() in {file}; {hint}")
    result = []
    for combination in itertools.product(*(_points(declared[name], f"{file}: sweep {name}".rstrip()) for name in names)):
        values: dict[str, Any] = {}
        for part in combination:
            if twice := values.keys() & part.keys():
                raise ConfigError(f"two of the sweeps {', '.join(names)} set {', '.join(sorted(twice))}; name one of them")
            values |= part
        result.append(values)
    if not result:
        raise ConfigError(f"the sweep {', '.join(names)} of {file} has no points")
    return result


def _is_sweep(name: str) -> bool:
    return name == "sweep" or name.startswith("sweep_")


def _points(sweep: Any, what: str) -> list[dict[str, Any]]:
    points = list(sweep())
    known = field_paths(ExperimentConfig)
    for point in points:
        if not isinstance(point, Mapping):
            raise ConfigError(f"{what} yields {point!r}; expected {{'FIELD': value, ...}}")
        for field in point:
            if field not in known:
                raise ConfigError(f"{what}: {unknown_field_message(field, known)}")
    return [dict(point) for point in points]


def _module(file: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_declarations", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(name: str, values: Mapping[str, Any], arguments: Sequence[str]) -> ExperimentConfig:
    """The experiment of a point, which has the values that the sweep gives it."""
    try:
        config = _experiment(arguments)
        for field, value in values.items():
            found = value_at(config, field)
            if found != (tuple(value) if isinstance(value, list) else value):
                raise ConfigError(f"config field '{field}' is {value!r}; the experiment makes {found!r} of it")
    except (ValueError, TypeError, flags.Error) as error:  # of which ConfigErrors are
        raise ConfigError(f"point {name} of the sweep: {error}" if values else str(error)) from error
    return config


def _experiment(arguments: Sequence[str]) -> ExperimentConfig:
    """What launch/train.py makes of these arguments."""
    values, command = flags.FlagValues(), ["sweep", *arguments]
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=command)
    values(command)
    return experiment_from(values.config.to_dict())


def _flags(values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"--config.{field}={value}" for field, value in values.items())
