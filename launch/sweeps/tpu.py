"""Runs on Cloud TPU: a loop over queued resources that can be stopped, and started again anywhere.

What there is to know is in the cloud: a run's queued resource has the name of its job, and status.json in its folder says how
far it has come. So the loop looks at both, does the next thing, and forgets. A machine that was taken away is asked for again;
that of a run which is finished, or fails in the same way every time, is deleted.

    none ─create─► WAITING_FOR_RESOURCES, PROVISIONING ─► ACTIVE ─finished, failed─► deleted
      ▲                                                     │ no process for too long, or the machine went: SUSPENDED, FAILED
      └───────────────────────── delete ◄───────────────────┘

A host starts by itself: its start-up script (tpu_host.sh), which runs at every boot, brings code, environment and command. It
reads the bucket through gcsfuse where a field of the configuration wants a folder (hosts.py).

gcloud's flags and states of queued resources are known to `QueuedResources` alone.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mimic_video.config import ConfigError
from mimic_video.runs.status import Status, read_status, record_end
from mimic_video.runs.storage import RunError, in_words, run_path
from mimic_video.training.preemption import EXIT_CODE
from sweeps import hosts
from sweeps.points import Job, is_trained

Provisioning = Literal["spot", "reserved", "on_demand"]

CREATIONS = 5  # of a run's machine at most, while its step does not advance
POLL = 30.0  # seconds between two looks at all runs
PATIENCE = 1200.0  # seconds that a machine may be there without a living process: it boots and installs in a few minutes
GRACE = 60.0  # seconds that hosts have to copy the end of their logs
DELETION = 300.0  # seconds after which it is asked for again
COPIES = 30.0  # seconds between two copies of a host's log

_HOME = "/var/lib/mimic-video"  # of a host


class Slice(NamedTuple):
    """What an accelerator type is: its topology as launch/compile.py has it, its chips, and the software of its hosts."""

    topology: str
    chips: int
    runtime: str


def _slices(prefix: str, chip: str, cores: int, runtime: str, shapes: str) -> dict[str, Slice]:
    """Slices of a chip by their accelerator types, whose number counts `cores` for each chip."""
    chips = {shape: math.prod(map(int, shape.split("x"))) for shape in shapes.split()}
    return {f"{prefix}-{cores * count}": Slice(f"{chip}:{shape}", count, runtime) for shape, count in chips.items()}


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_DEEP = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
# From Google's pages on each TPU version ("Configurations") and on TPU software versions.
TYPES = {
    **_slices("v5litepod", "v5e", 1, "v2-alpha-tpuv5-lite", _FLAT),
    **_slices("v5p", "v5p", 2, "v2-alpha-tpuv5", _DEEP),
    **_slices("v6e", "v6e", 1, "v2-alpha-tpuv6e", _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How machines are asked for.

    Attributes:
        accelerator_type: one of `TYPES`, such as v5litepod-16.
        slices: of that type, joined by the data centre's network, for each run.
        provisioning: spot machines may be taken away at any time, and cost least.
        jobs: runs that have machines at the same time; 0 for all.
    """

    accelerator_type: str
    slices: int = 1
    provisioning: Provisioning = "spot"
    jobs: int = 0


# What is checked before anything is created


def check(jobs: Sequence[Job], workdir: str, options: Options) -> None:
    """Raises ConfigError, naming the flag or the field, for what hosts could not do."""
    if not re.fullmatch(r"gs://[^/]+/.+", workdir):
        raise ConfigError(f"--workdir is {workdir!r}; expected gs://BUCKET/FOLDER, which all hosts and this machine reach")
    kind = TYPES.get(options.accelerator_type)
    if kind is None:
        raise ConfigError(f"--accelerator_type is {options.accelerator_type!r}; expected one of {', '.join(TYPES)}")
    for job in jobs:
        hosts.config_file(job)
        hosts.require_no_evaluation(job)
        try:
            hosts.check_experiment(job.config, kind.chips * options.slices, options.slices)
        except ConfigError as error:
            raise ConfigError(f"{options.accelerator_type} x {options.slices}, {job.run}: {error}") from error


def _upload(workdir: str) -> str:
    """Puts the code into the bucket, if it is not there. Returns its name."""
    name, content = hosts.archive()
    path = run_path(f"{workdir}/code/{name}.tar.gz")
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=hosts.ROOT, capture_output=True, text=True).stdout
    if changed:
        print(f"changes that are not committed are part of the code: {len(changed.splitlines())} files", flush=True)
    with in_words(str(path)):
        if not path.exists():
            path.write_bytes(content)
    print(f"code: {path}", flush=True)
    return name


# What a host does


def startup_script(job: Job, workdir: str, code: str) -> str:
    """The start-up script of a run's hosts.

    Args:
        code: the name of the code in the bucket.
    """
    bucket, _, folder = job.run.removeprefix("gs://").partition("/")
    variables = {
        "bucket": bucket,
        "folder": urllib.parse.quote(folder, safe=""),
        "archives": urllib.parse.quote(f"{workdir}/code".removeprefix(f"gs://{bucket}/"), safe=""),
        "archive": code,
        "compiled": f"{workdir}/compilation_cache",
        "home": _HOME,
        "mounts": hosts.MOUNTS,
        "buckets": " ".join(hosts.mounted_buckets(job.config)),
        "extras": hosts.extras(job.config),
        "seconds": f"{COPIES:g}",
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    arguments = [f"  {shlex.quote(argument)}" for argument in hosts.arguments(job)]
    host = (pathlib.Path(__file__).parent / "tpu_host.sh").read_text()
    return "\n".join(["#!/bin/bash", *lines, "arguments=(", *arguments, ")", host])


# Queued resources


class CloudError(RunError):
    """What gcloud refuses. `passes` if the same may succeed later: the network, limits of requests and of machines."""

    def __init__(self, message: str):
        super().__init__(message)
        self.passes = bool(_PASSING.search(message))


_PASSING = re.compile(
    r"\b(RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|ALREADY_EXISTS|429|500|502|503|504)\b"
    r"|(?i:quota|rate limit|timed? ?out|unable to find the server|connection|network is|temporar|try again)"
)


class Resource(NamedTuple):
    """A queued resource: what it is doing, since when it is there (UTC), and why it failed, if it did."""

    state: str
    created: str
    reason: str = ""


class QueuedResources:
    """Those of a project and a zone, by gcloud. Nothing waits: what was asked for is seen in the next `listed`."""

    def __init__(self, project: str, zone: str):
        self._where = [f"--project={project}", f"--zone={zone}"]

    @classmethod
    def of_environment(cls) -> "QueuedResources":
        """Raises ConfigError if gcloud is missing, or does not know where to create anything."""
        if shutil.which("gcloud") is None:
            raise ConfigError(
                "gcloud is not installed; expected Google Cloud's command line, https://cloud.google.com/sdk/docs/install"
            )
        known = json.loads(_gcloud(["config", "list", "--format=json"]) or "{}")
        values = {}
        for section, name, variable in (
            ("core", "project", "CLOUDSDK_CORE_PROJECT"),
            ("compute", "zone", "CLOUDSDK_COMPUTE_ZONE"),
        ):
            if not (value := known.get(section, {}).get(name)):
                raise ConfigError(f"gcloud knows no {name}; expected it from gcloud config set {section}/{name} or in {variable}")
            values[name] = value
        return cls(**values)

    def creation(self, name: str, options: Options, script: str) -> list[str]:
        """Arguments of gcloud that ask for a machine, whose hosts run the script in a file."""
        several = [f"--node-count={options.slices}", f"--node-prefix={name}"]
        return [
            *self._command("create", name),
            *([f"--node-id={name}"] if options.slices == 1 else several),
            f"--accelerator-type={options.accelerator_type}",
            f"--runtime-version={TYPES[options.accelerator_type].runtime}",
            *{"spot": ["--spot"], "reserved": ["--reserved"], "on_demand": []}[options.provisioning],
            "--scopes=cloud-platform",
            f"--metadata-from-file=startup-script={script}",
            "--async",
        ]

    def deletion(self, name: str) -> list[str]:
        return [*self._command("delete", name), "--force", "--quiet", "--async"]

    def listing(self) -> list[str]:
        return [*self._command("list"), "--format=json(name,createTime,state)"]

    def create(self, name: str, options: Options, script: str) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(script)
            file.flush()
            _gcloud(self.creation(name, options, file.name))

    def delete(self, name: str) -> None:
        _gcloud(self.deletion(name))

    def listed(self) -> dict[str, Resource]:
        """All there are, by name."""
        return {each["name"].rpartition("/")[2]: _resource(each) for each in json.loads(_gcloud(self.listing()) or "[]")}

    def _command(self, verb: str, *name: str) -> list[str]:
        return ["compute", "tpus", "queued-resources", verb, *name, *self._where]


def _resource(values: Mapping[str, Any]) -> Resource:
    state = values.get("state", {})
    reason = state.get("failedData", {}).get("error", {}).get("message", "")
    return Resource(state.get("state", "STATE_UNSPECIFIED"), values.get("createTime", ""), reason)


def _gcloud(arguments: Sequence[str]) -> str:
    """What gcloud prints. Raises CloudError with what it says."""
    # Its own session: Ctrl-C is for the loop, and nothing is asked for by half.
    done = subprocess.run(
        ["gcloud", *arguments], capture_output=True, text=True, start_new_session=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise CloudError(" ".join(done.stderr.split()) or f"gcloud {' '.join(arguments)} ends with exit code {done.returncode}")
    return done.stdout


# The loop


class Verdict(NamedTuple):
    """What is to be done about a run, and what is said of it: when `state` changes, with the details."""

    do: Literal["create", "delete", "wait", "finish", "fail"]
    state: str
    detail: str = ""


def judged(resource: Resource | None, status: Status, codes: Mapping[str, int], quiet: float) -> Verdict:
    """What is to be done about a run.

    Args:
        resource: its queued resource; None if it has none.
        status: what it says of itself.
        codes: with what exit code its hosts ended, by name, since the resource was created; nothing of those that live.
        quiet: seconds that the machine has been there without a living process.
    """
    # What failed before the resource was created is of an earlier attempt.
    failed = resource and status.state == "failed" and status.updated[:19] >= resource.created[:19] > ""
    if (failed or status.state == "finished") and resource and resource.state == "ACTIVE" and not codes and quiet < GRACE:
        return Verdict("wait", "ending")
    if status.state == "finished":
        return Verdict("finish", "finished", f"{status.steps} steps in {status.seconds / 3600:.1f} hours")
    if resource is None:
        return Verdict("create", "waiting")
    if resource.state in ("DELETING", "SUSPENDING"):
        return Verdict("wait", resource.state)
    if failed:
        return Verdict("fail", "failed", status.reason)
    if resource.state in ("SUSPENDED", "FAILED"):
        return Verdict("delete", resource.state, resource.reason or "its machine was taken away")
    if resource.state != "ACTIVE":
        return Verdict("wait", resource.state)
    if status.state == "running":
        return Verdict("wait", "running", f"step {status.step} of {status.steps}, start {status.starts}")
    if ended := sorted(f"{host} with exit code {code}" for host, code in codes.items() if code):
        return Verdict("delete", "lost", f"{status.reason or 'hosts ended'}: {', '.join(ended[:3])}{', …' * (len(ended) > 3)}")
    if quiet > PATIENCE:
        return Verdict("delete", "lost", f"its machine is there, but no process has trained for {quiet:.0f} s")
    return Verdict("wait", "starting", "its hosts boot, install and join")


@dataclasses.dataclass
class _Run:
    """What the loop remembers of a run: none of it is needed to go on after a restart."""

    job: Job
    label: str
    outcome: Literal["", "finished", "failed"] = ""
    reason: str = ""
    said: str = ""
    creations: int = 0  # while the step did not advance
    step: int = -1  # at the last creation that counts as progress
    quiet_since: float | None = None
    deletion: float = float("-inf")  # when it was asked for
    gone: bool = False

    def say(self, state: str, detail: str = "") -> None:
        if state != self.said:
            print(f"{time.strftime('%F %T')}  {self.label}  {state}{': ' * bool(detail)}{detail}", flush=True)
        self.said = state


def run(jobs: Sequence[Job], workdir: str, options: Options, poll: float = POLL) -> int:
    """Trains runs to their ends, `options.jobs` of them at once.

    Returns:
        0 if all are finished, 1 if some failed, 75 if it was asked to stop (SIGINT, SIGTERM): then machines go on by themselves,
        and the same call continues to watch.

    Raises:
        ConfigError: for what hosts could not do, before anything is created.
        RunError: if the bucket cannot be read or written.
        CloudError: if gcloud refuses to list what there is.
    """
    check(jobs, workdir := workdir.rstrip("/"), options)
    cloud = QueuedResources.of_environment()
    code = _upload(workdir)
    runs = [_Run(job, job.run.removeprefix(workdir).strip("/") or job.name) for job in jobs]
    with _asked_to_stop() as asked:
        while not asked.is_set():
            if _round(runs, cloud, workdir, code, options):
                return _summary(runs)
            asked.wait(poll)
    print(
        "stopped watching: runs go on, but machines that are taken away are not asked for again. The same command continues, "
        "here or elsewhere; with --stop it deletes the machines.",
        flush=True,
    )
    return EXIT_CODE


def stop(jobs: Sequence[Job], poll: float = POLL) -> int:
    """Deletes the queued resources of runs with their machines, and waits until they are gone."""
    cloud, names = QueuedResources.of_environment(), {job.name: job.run for job in jobs}
    asked: dict[str, float] = {}
    while True:
        try:
            left = {name: resource for name, resource in cloud.listed().items() if name in names}
            if not left:
                break
            for name, resource in left.items():
                if resource.state != "DELETING" and time.monotonic() - asked.get(name, float("-inf")) > DELETION:
                    cloud.delete(name)
                    asked[name] = time.monotonic()
                    print(f"{time.strftime('%F %T')}  {names[name]}  deleting {name}, which was {resource.state}", flush=True)
        except CloudError as error:
            if not error.passes:
                raise
            print(f"{time.strftime('%F %T')}  trying again: {error}", flush=True)
        time.sleep(poll)
    print(f"{len(asked)} queued resources were deleted; none is left of these {len(names)} runs", flush=True)
    return 0


def dry_run(jobs: Sequence[Job], workdir: str, options: Options) -> str:
    """What `run` would do, after the same checks: gcloud's commands and start-up scripts, without a look at the cloud.

    PROJECT and ZONE stand for gcloud's own, and HASH for the name of the code.
    """
    check(jobs, workdir := workdir.rstrip("/"), options)
    cloud, kind = QueuedResources("PROJECT", "ZONE"), TYPES[options.accelerator_type]
    lines = [
        f"# {len(jobs)} runs, {options.jobs or len(jobs)} at a time, each on {options.slices} slices of {kind.topology}.",
        f"# PROJECT and ZONE are gcloud's; HASH is that of the clone's tracked files, in {workdir}/code/HASH.tar.gz.",
        f"gcloud {shlex.join(cloud.listing())}",
    ]
    for job in jobs:
        lines += [
            "",
            f"# {job.run}: again after {job.name} was SUSPENDED or FAILED, and deleted when it is finished",
            f"gcloud {shlex.join(cloud.creation(job.name, options, job.name + '.sh'))}",
            f"gcloud {shlex.join(cloud.deletion(job.name))}",
        ]
    for job in jobs:
        lines += ["", f"# {job.name}.sh", startup_script(job, workdir, "HASH").rstrip("\n")]
    return "\n".join(lines) + "\n"


def _round(runs: Sequence[_Run], cloud: QueuedResources, workdir: str, code: str, options: Options) -> bool:
    """Looks at every run once, and does what is to be done. Returns whether nothing is left to do."""
    try:
        resources = cloud.listed()
    except CloudError as error:
        if not error.passes:
            raise
        print(f"{time.strftime('%F %T')}  gcloud cannot list queued resources, trying again: {error}", flush=True)
        return False
    busy = sum(run.job.name in resources for run in runs)
    for run in runs:
        resource = resources.get(run.job.name)
        if run.outcome and resource is None:
            run.gone = True
        if run.gone:
            continue
        try:
            verdict = _look(run, resource)
            if verdict.do == "fail" and not run.outcome:
                _record_failure(run.job, verdict.detail)
            if verdict.do == "create":
                if busy < (options.jobs or len(runs)):
                    busy += 1
                    _create(run, cloud, startup_script(run.job, workdir, code), options)
                continue
        except RunError as error:
            if isinstance(error, CloudError) and not error.passes:
                run.outcome, run.reason, run.gone = "failed", str(error), True
            run.say(f"{'failed' if run.gone else 'trying again'}: {error}")
            continue
        run.say(verdict.state, verdict.detail)
        if verdict.do in ("finish", "fail"):
            run.outcome, run.reason = ("finished", "") if verdict.do == "finish" else ("failed", verdict.detail)
            run.gone = resource is None
        if verdict.do == "delete":
            run.reason = f"{verdict.state}: {verdict.detail}"
        if verdict.do != "wait" and resource is not None:
            _delete(run, resource, cloud)
    return all(run.gone for run in runs)


def _look(run: _Run, resource: Resource | None) -> Verdict:
    """`judged`, of a run as it is now."""
    if run.outcome:
        return Verdict("finish" if run.outcome == "finished" else "fail", run.said, run.reason)
    active = resource is not None and resource.state == "ACTIVE"
    with in_words(run.job.run):
        status = read_status(run_path(run.job.run))
        codes = _codes(run.job.run) if active and status.state != "running" else {}
    if status.state == "finished" and not is_trained(run.job, status):
        status = dataclasses.replace(status, state="waiting")  # for what there is to train now
    if not active or status.state == "running":
        run.quiet_since = None
    elif run.quiet_since is None:
        run.quiet_since = time.monotonic()
    quiet = 0.0 if run.quiet_since is None else time.monotonic() - run.quiet_since
    verdict = judged(resource, status, codes, quiet)
    if verdict.do == "create":
        if status.step > run.step:
            run.step, run.creations = status.step, 0
        if run.creations == CREATIONS:
            return Verdict("fail", "failed", f"asked for {CREATIONS} times without getting beyond step {run.step}; {run.reason}")
    return verdict


def _record_failure(job: Job, reason: str) -> None:
    """Says for a run that could not why it failed."""
    with in_words(job.run):
        if read_status(run_path(job.run)).state != "failed":
            record_end(run_path(job.run), "training", "failed", reason)


def _create(run: _Run, cloud: QueuedResources, script: str, options: Options) -> None:
    """Asks for a run's machine."""
    with in_words(run.job.run):
        for host in _codes(run.job.run):
            (run_path(run.job.run) / "logs" / "ended" / host).unlink()
    cloud.create(run.job.name, options, script)
    run.creations += 1
    run.deletion = float("-inf")
    run.say(f"asked for {run.job.name}", f"{options.slices} x {options.accelerator_type}, {options.provisioning}")


def _delete(run: _Run, resource: Resource, cloud: QueuedResources) -> None:
    """Asks for the deletion of a run's machine; again if nothing comes of it."""
    if resource.state == "DELETING" or time.monotonic() - run.deletion < DELETION:
        return
    try:
        cloud.delete(run.job.name)
        run.deletion = time.monotonic()
    except CloudError as error:  # whatever it is: a machine that stays costs money
        run.say(f"{run.job.name} is not deleted, trying again: {error}")


def _codes(path: str) -> dict[str, int]:
    """Exit codes that a run's hosts left, by their names."""
    folder = run_path(f"{path}/logs/ended")
    return {host.name: int(host.read_text()) for host in folder.iterdir()} if folder.exists() else {}


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the next one has its usual effect."""
    asked = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def notice(*_: Any) -> None:
        asked.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, notice) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(runs: Sequence[_Run]) -> int:
    failed = [run for run in runs if run.outcome == "failed"]
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are finished", flush=True)
    for run in failed:
        print(f"failed: {run.label}: {run.reason}; logs of its hosts are in {run.job.run}/logs", flush=True)
    return 1 if failed else 0
