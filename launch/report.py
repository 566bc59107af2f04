"""Writes one HTML page about evaluated runs; its plots also go to `figures/` beside it.

    python launch/report.py --out=runs/quickstart/report.html --video_run=runs/quickstart/video \\
        --policy_run='trained backbone=runs/quickstart/action' \\
        --policy_run='untrained backbone=runs/quickstart/action-untrained-0' --expert_run=runs/quickstart/expert

A --policy_run is LABEL=DIR, or LABEL=DIR,DIR,... for several training seeds; the first is compared with each of the others. A DIR
with a comma in its name is to be written in double quotes where there are several.
"""

import pathlib

import experiment
from absl import flags

from mimic_video.config import split_paths
from mimic_video.evaluation.report import write_report
from mimic_video.runs.storage import RunError, local_path

_OUT = flags.DEFINE_string("out", None, "HTML file to write", required=True)
_TITLE = flags.DEFINE_string("title", "Video-action model: report", "Heading of the page")
_VIDEO = flags.DEFINE_string("video_run", None, "Evaluated run directory of stage `video`", required=True)
_POLICIES = flags.DEFINE_multi_string("policy_run", None, "LABEL=DIR[,DIR...]: evaluated runs of stage `action`", required=True)
_EXPERT = flags.DEFINE_string("expert_run", None, "Directory with the scripted expert's evaluation.json")


def parse_policies(arguments: list[str]) -> dict[str, list[pathlib.Path]]:
    """LABEL=DIR[,DIR...] arguments in order. Raises ValueError for another form, or a label that comes twice."""
    policies = {}
    for argument in arguments:
        label, equals, directories = argument.partition("=")
        names = [directories] if local_path(directories).is_dir() else split_paths(directories)
        runs = [local_path(name.strip('"')) for name in names if name]
        if not (label and equals and runs):
            raise ValueError(f"--policy_run={argument!r} is not of the form LABEL=DIR[,DIR...]")
        if label in policies:
            raise ValueError(f"--policy_run names {label!r} twice; give its runs as one comma-separated list")
        policies[label] = runs
    return policies


def main() -> None:
    out, expert = pathlib.Path(_OUT.value), _EXPERT.value
    write_report(
        out,
        title=_TITLE.value,
        video_run=local_path(_VIDEO.value),
        policies=parse_policies(_POLICIES.value),
        expert=local_path(expert) if expert else None,
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    experiment.run(main, (ValueError, RunError, ModuleNotFoundError), config=False, compilation_cache=None)
