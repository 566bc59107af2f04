"""Bundles on the Hugging Face Hub, which go by `hf://USER/NAME[@REVISION]`.

    USER/NAME/README.md   the model card
    USER/NAME/bundle/     the bundle, as launch/export.py writes it

A bundle has a folder of its own because nothing may be in it that its manifest does not list. The endpoint, the token and the
cache are those of the package huggingface_hub and of its environment variables.
"""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from etils import epath

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.embodiments import Embodiment
from mimic_video.runs.directory import load_embodiments, read_config
from mimic_video.runs.storage import RunError

FOLDER = "bundle"  # of a repository
SCHEME = "hf://"
_CARD = "README.md"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_TOKEN = "a token in HF_TOKEN, or from `hf auth login`,"


class Place(NamedTuple):
    """Where on the Hub a bundle is: `revision` is a branch, a tag or a commit, None for what is newest."""

    repository: str
    revision: str | None


def is_on_hub(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(SCHEME)


def parse(url: str) -> Place:
    """Raises ConfigError unless it is `hf://USER/NAME[@REVISION]`."""
    repository, at, revision = url.removeprefix(SCHEME).partition("@")
    if not url.startswith(SCHEME) or not _REPOSITORY.fullmatch(repository) or bool(at) != bool(revision):
        raise ConfigError(f"a policy on the Hub is named {url!r}; expected {SCHEME}USER/NAME or {SCHEME}USER/NAME@REVISION")
    return Place(repository, revision or None)


def fetch(url: str) -> pathlib.Path:
    """The folder with a bundle of the Hub in this machine's cache. What is there already is not downloaded again.

    Where the Hub cannot be reached it is what was newest the last time. Files are not verified: `read_bundle` does so.

    Raises:
        ConfigError: for another name than `parse` takes, or without huggingface_hub.
        RunError: if there is no such repository, revision or bundle, it may not be read, or the Hub cannot be reached.
    """
    place, library = parse(url), _library()
    with _in_words(url, library, "read"):
        snapshot = library.snapshot_download(place.repository, revision=place.revision, allow_patterns=f"{FOLDER}/*")
    folder = pathlib.Path(snapshot) / FOLDER
    if not folder.is_dir():
        raise RunError(f"{url} has no folder {FOLDER}/: it is no policy of launch/export.py --push_to_hub")
    return folder


def reserve(repository: str, private: bool) -> None:
    """Makes a repository unless it is there, whose visibility stays: what is wrong with the name or the token is an error now.

    Raises:
        ConfigError: for another name than USER/NAME, or without huggingface_hub.
        RunError: if it may not be written, or the Hub cannot be reached.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push_to_hub={repository} is no repository of the Hub; expected USER/NAME")
    library = _library()
    with _in_words(repository, library, "written"):
        library.HfApi().create_repo(repository, private=private or None, exist_ok=True)


def read_evaluation(run: epath.Path) -> dict[str, Any] | None:
    """What launch/evaluate.py found out about a run; None if nothing. Raises RunError if the file is damaged."""
    path = run / "evaluation.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; run launch/evaluate.py again, or remove it") from error


def push(
    bundle: pathlib.Path, repository: str, *, license: str | None = None, evaluation: Mapping[str, Any] | None = None
) -> str:
    """Puts a bundle and its model card into a repository, in one commit. Returns the commit.

    A bundle that was there before is replaced; revisions keep it.

    Args:
        license: of the weights, as the Hub calls it; None says nothing.
        evaluation: evaluation.json of the run.

    Raises:
        RunError: as `reserve`.
    """
    library = _library()
    api, add, delete = library.HfApi(), library.CommitOperationAdd, library.CommitOperationDelete
    step = json.loads((bundle / "manifest.json").read_text())["step"]
    card = model_card(repository, read_config(bundle), load_embodiments(bundle), step, license, evaluation)
    files = {f"{FOLDER}/{path.relative_to(bundle).as_posix()}": path for path in sorted(bundle.rglob("*")) if path.is_file()}
    with _in_words(repository, library, "written"):
        old = {name for name in api.list_repo_files(repository) if name.startswith(f"{FOLDER}/")} - files.keys()
        operations = [
            add(_CARD, card.encode()),
            *(add(name, str(path)) for name, path in files.items()),
            *map(delete, sorted(old)),
        ]
        return api.create_commit(repository, operations, commit_message=f"Policy of step {step}").oid


def model_card(
    repository: str,
    config: ExperimentConfig,
    robots: Mapping[str, Embodiment],
    step: int,
    license: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the Hub's metadata: robots, data, networks, results, how to load. Paths of the machine are not in it."""
    data, backbone, decoder = config.data, config.backbone, config.decoder
    metadata = {
        **({"license": license} if license else {}),
        "library_name": "mimic-video-jax",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "jax", "video-action-model"],
    }
    height, width = data.image_size
    robot_rows = [
        [
            f"`{name}`",
            ", ".join(f"`{each}`" for each in robot.datasets) or "its own",
            ", ".join(robot.cameras),
            str(robot.proprio_dim),
            str(robot.action_dim),
        ]
        for name, robot in robots.items()
    ]
    facts = {
        "Window": f"{data.past_frames} past and {data.future_frames} future frames of {height}x{width} at {data.video_hz:g} Hz",
        "Actions": f"chunks of {data.action_horizon} at {data.control_hz:g} Hz, the first after {data.action_delay:g} s",
        "Video backbone": f"{backbone.kind}, {backbone.num_blocks} blocks of width {backbone.width}; the decoder reads block "
        f"{backbone.hidden_block}",
        "Action decoder": f"{decoder.num_blocks} blocks of width {decoder.width}",
        "Tokenizer, text": f"{config.tokenizer.kind}, {config.text.kind}",
        "Trained for": f"{step} steps of {config.train.batch_size} samples",
        "Parameters": f"{config.precision}" + (", backbone in eight bits" if config.policy.weights == "int8" else ""),
    }
    first = next(iter(robots))
    argument = "" if len(robots) == 1 else f', embodiment="{first}"'
    flag = "" if len(robots) == 1 else f" --embodiment={first}"
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {repository.partition('/')[2]}",
        "A [mimic-video](https://arxiv.org/abs/2512.15692) policy: a video model whose hidden states an action decoder reads. "
        "It takes images, proprioception and an instruction, and gives chunks of actions in the robot's own units.",
        f"## Use\n\n```python\nfrom mimic_video import Policy\n\n"
        f'policy = Policy.load("{SCHEME}{repository}"{argument})\n```\n\n'
        f"```bash\npython launch/serve.py --policy={SCHEME}{repository}{flag}\n```",
        "## Robots\n\n" + _table(["robot", "datasets", "cameras", "proprioception", "actions"], robot_rows),
        "## Model\n\n" + _table(["", ""], [list(row) for row in facts.items()]) + f"\n\nAll fields: `{FOLDER}/config.json`.",
        *([f"## Results\n\n{results}"] if evaluation and (results := _results(evaluation)) else []),
    ]
    return "\n\n".join(sections) + "\n"


def _results(evaluation: Mapping[str, Any]) -> str:
    parts = []
    if success := evaluation.get("success"):
        rows = [
            [task, f"{row['successes']} of {row['episodes']}", f"{row['rate']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}"]
            for task, row in success.items()
        ]
        simulator = evaluation.get("evaluation", {}).get("simulator", "a simulator")
        parts.append(f"Closed loop in {simulator}:\n\n" + _table(["task", "successes", "rate", "95 % interval"], rows))
    if errors := evaluation.get("open_loop"):
        named = {"rmse": "of all actions of a chunk", "first_step_rmse": "of the first action"}
        rows = [[name, f"{errors[key]:.4g}"] for key, name in named.items() if key in errors]
        parts.append(
            f"On {errors.get('windows', 'some')} held-out windows, root mean squares in units of normalised actions:\n\n"
            + _table(["error", ""], rows)
        )
    return "\n\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _library() -> Any:
    try:
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise ConfigError(
            "policies on the Hub need the package huggingface_hub; expected after pip install 'mimic-video-jax[hub]'"
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _in_words(what: str, library: Any, done: str) -> Iterator[None]:
    """Makes RunErrors of what the Hub and its client raise: `what` cannot be `done`."""
    errors = library.errors
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise RunError(f"{what}: the Hub has no such revision of it (a branch, a tag or a commit)") from error
    except errors.GatedRepoError as error:
        raise RunError(f"{what}: its owner has to give you access on the Hub; then it needs {_TOKEN} of that account") from error
    except errors.RepositoryNotFoundError as error:
        raise RunError(
            f"{what}: the Hub has no such repository, or it is private: then it needs {_TOKEN} that may read it"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise RunError(f"{what} cannot be {done}: the Hub answers {status}; it needs {_TOKEN} that may do so") from error
        raise RunError(f"{what} cannot be {done}: {error}") from error
    except (OSError, ValueError) as error:  # no network and nothing cached; refused metadata or names
        raise RunError(f"{what} cannot be {done}: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("huggingface_hub", "httpx", "httpx2", "httpcore"):
            raise
        raise RunError(f"{what} cannot be {done}: the Hub cannot be reached: {error!r}") from error
