"""Runs of a sweep on this machine, several at a time, each on devices of its own.

A run that another launcher, here or on another machine, is working on is left to that one and looked at again when it ends: so
the same command may be given twice, or again after the launcher was killed, whose runs go on.
"""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from etils import epath

from mimic_video.config import ConfigError
from mimic_video.runs.status import Activity, read_status, record_end
from mimic_video.runs.storage import Spool, run_path
from mimic_video.training.preemption import EXIT_CODE
from sweeps.points import Job, remaining

LAUNCH = pathlib.Path(__file__).resolve().parent.parent
_POLL = 0.2  # seconds
_OTHERS = 2.0  # seconds between two looks at runs of other launchers


def slots(jobs: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What the environment of each of several runs at once has beside this one's: the GPUs that are its own.

    Args:
        jobs: how many; 0 for one a GPU, or one where there is none.

    Raises:
        ConfigError: if there are fewer GPUs.
    """
    gpus = _gpus(environment)
    if not gpus:
        return [{}] * (jobs or 1)
    jobs = jobs or len(gpus)
    if jobs > len(gpus):
        raise ConfigError(f"--jobs is {jobs}, with {len(gpus)} GPUs; expected at most one run at a time for each")
    each = len(gpus) // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(jobs)]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    if environment.get("JAX_PLATFORMS") == "cpu":
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())] if listed.returncode == 0 else []


def dry_run(jobs: Sequence[Job], jobs_at_once: int) -> str:
    """The commands of every run, a line each, and on how many GPUs they run."""
    at_once = slots(jobs_at_once, os.environ)
    lines = [f"# {len(jobs)} runs, {len(at_once)} at a time" + "".join(f", on GPUs {slot}" for slot in _named(at_once))]
    for job in jobs:
        lines += [shlex.join(["python", f"launch/{script}", *arguments]) for script, *arguments in remaining(job)]
    return "\n".join(lines)


def _named(at_once: Sequence[Mapping[str, str]]) -> list[str]:
    return [slot["CUDA_VISIBLE_DEVICES"] for slot in at_once if slot]


def run(jobs: Sequence[Job], jobs_at_once: int, show: Callable[[], contextlib.AbstractContextManager[None]]) -> int:
    """Runs what remains of each job.

    SIGINT and SIGTERM are passed on to the runs, which save and end; no other one starts.

    Args:
        show: a context in which the table is kept up to date.

    Returns:
        An exit code: 0 if all have finished, `EXIT_CODE` if it was asked to stop or any run was, else 1.
    """
    launcher = _Launcher(jobs)
    threads = [threading.Thread(target=launcher.work, args=(slot,), daemon=True) for slot in slots(jobs_at_once, os.environ)]
    with launcher.passing_signals_on(), show():
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(_POLL)
    return launcher.exit_code()


class _Launcher:
    """Jobs that wait, processes that run, and how they ended; shared by one thread a slot."""

    def __init__(self, jobs: Sequence[Job]):
        self._waiting = list(jobs)
        self._processes: set[subprocess.Popen] = set()
        self._codes: dict[str, int] = {}
        self._lock, self._stopping = threading.Lock(), threading.Event()

    def exit_code(self) -> int:
        codes = self._codes.values()
        return EXIT_CODE if self._stopping.is_set() or EXIT_CODE in codes else int(any(codes))

    @contextlib.contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        def stop(number: int, _: object) -> None:
            if not self._stopping.is_set():
                print("stopping: the runs finish their steps and save; the same command continues them", flush=True)
            self._stopping.set()
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def work(self, slot: Mapping[str, str]) -> None:
        """Runs one job after the other until none waits."""
        while not self._stopping.is_set():
            with self._lock:
                if not self._waiting:
                    return
                job = next((job for job in self._waiting if not _is_running(job)), None)
                if job is not None:
                    self._waiting.remove(job)
            if job is None:  # others have them
                self._stopping.wait(_OTHERS)
                continue
            try:
                code = self._run(job, slot)
            except Exception as error:  # of a file system or a bucket; the other runs go on
                print(f"error: {job.run}: {error!r}", file=sys.stderr, flush=True)
                code = 1
            if code and code != EXIT_CODE and _is_running(job):  # another launcher was faster
                code = None
            with self._lock:
                if code is None:
                    self._waiting.append(job)
                else:
                    self._codes[job.run] = code

    def _run(self, job: Job, slot: Mapping[str, str]) -> int | None:
        """The exit code of the first command that fails, or 0; None if a signal came before the last one."""
        run = run_path(job.run)
        with Spool(run) as spool:
            spool.path.mkdir(parents=True, exist_ok=True)
            for script, *arguments in remaining(job):
                starts = read_status(*_status_of(job, script, arguments)).starts
                with self._lock:
                    if self._stopping.is_set():
                        return None
                    with open(spool.path / "log.txt", "ab") as log:
                        process = subprocess.Popen(
                            [sys.executable, str(LAUNCH / script), *arguments],
                            env={**os.environ, **slot},
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL,
                            start_new_session=True,  # a Ctrl-C reaches the launcher alone, which passes it on once
                        )
                    self._processes.add(process)
                code = process.wait()
                self._processes.discard(process)
                spool.publish()
                if code:
                    _record(job, script, arguments, starts, code, spool.path / "log.txt")
                    return code
        return 0


def _status_of(job: Job, script: str, arguments: Sequence[str]) -> tuple[epath.Path, Activity]:
    """Where a command reports, and as what."""
    if script == "train.py":
        return run_path(job.run), "training"
    return run_path(next(out for out, given in job.evaluations.items() if given == tuple(arguments))), "evaluation"


def _is_running(job: Job) -> bool:
    """Whether any process is at work on a job."""
    evaluations = any(read_status(run_path(out), "evaluation").state == "running" for out in job.evaluations)
    return evaluations or read_status(run_path(job.run)).state == "running"


def _record(job: Job, script: str, arguments: Sequence[str], starts: int, code: int, log: pathlib.Path) -> None:
    """Says how a command ended that could not say so itself: it was killed, or failed before the run was its own."""
    place, activity = _status_of(job, script, arguments)
    status = read_status(place, activity)
    if code < 0 and status.state == "killed":
        record_end(place, activity, "killed", f"by {signal.Signals(-code).name}")
    elif status.starts == starts and status.state != "running":
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        record_end(place, activity, "failed", lines[-1].removeprefix("error: ") if lines else f"exit code {code}")
