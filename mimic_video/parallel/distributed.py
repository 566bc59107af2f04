"""A run of several processes: how they find each other, and how all of them end when one does.

`processes` joins the processes and watches over them. A process that fails says so in the key-value store of JAX's coordination
service, which is in process 0; a thread in each of the others waits for that, prints the reason and ends its process, even if the
main thread hangs in a collective operation. Process 0 also says so of a process that it has not heard of for `SILENCE` seconds:
one that was killed, ran out of memory or lost its machine.

Exit codes of a process when there are several: 1 if it failed itself, `OTHER_FAILED` if another one did. Process 0 ends last: if
it vanishes without a word, JAX aborts the others at once (SIGABRT), with a message that the leader task died.
"""

import collections
import contextlib
import functools
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src import cloud_tpu_init
from jax._src.distributed import global_state  # there is no public way to the key-value store
from jax.experimental import multihost_utils

from mimic_video.config import ConfigError
from mimic_video.parallel.tpu_hosts import instance_group_peers, require_alone, told_addresses

OTHER_FAILED = 69  # EX_UNAVAILABLE of sysexits.h
PATIENCE = 3600.0  # seconds for which processes wait for one that lives; one that does not ends them all sooner
SILENCE = 30.0  # seconds; collectives, compilation and I/O release the interpreter lock, so no living process is silent so long
_MESSAGE_BYTES = 1000  # of what `agree` sends
_BOOT = 1200  # seconds that a host of a pod waits for the others, which boot and install by themselves
_BEAT = 2.0  # seconds between signs of life, and that a process waits for the others to do something
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PORTS = range(20_000, 32_000)  # of coordinators under Slurm: no privileged ones, nor those that Linux gives to clients
_GRPC_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # that gRPC heeds
_FAILURE, _ALIVE, _LEAVING = "mimic_video/failure", "mimic_video/alive", "mimic_video/leaving"
_SILENT = "has shown no sign of life"
_LAST_WORDS: list[Callable[[str, bool], None]] = []
_TURNS: collections.Counter[str] = collections.Counter()  # of what processes do together, which has a name only once
# What JAX and gloo raise where another process is missing begins with a status; local mistakes of a program have other types.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS): ")


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the run's processes, if the environment says that there are several, for as long as the context lasts.

    An exception that leaves the context, a SystemExit with a message included, ends all processes: this one with exit code 1. A
    SystemExit with a number is an orderly end that all of them reach.

    Raises:
        ConfigError: if the environment is contradictory or half set.
    """
    initialize(os.environ)
    if global_state.num_processes == 1:
        yield
        return
    logging.get_absl_handler().setFormatter(_NumberedFormatter())
    watch = _Watch()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit) or isinstance(error.code, str):
            watch.fail(error)
        watch.close()
        raise
    watch.close()


def initialize(environment: Mapping[str, str]) -> None:
    """Connects to the run's other processes, or does nothing if there are none. No JAX backend may have been touched before.

    Processes are described by one of, in this order:
      * JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID;
      * SLURM, in a step of several tasks, which are one run, whatever other steps the job has; each takes the GPUs that are its
        own (--gpus-per-task, or one task a node) or, where all see the same, the one of its number on the node, or
        JAX_LOCAL_DEVICE_IDS ("0,1,2,3"). Process 0 listens at a port that follows from the job and the step, or at
        JAX_COORDINATOR_PORT;
      * Cloud TPU, on every host of a pod slice, or of several slices: tpu_hosts.py says what tells a host of the others.
    JAX_NUM_PROCESSES=1 keeps a process by itself on either of the latter.

    Raises:
        ConfigError: naming the variable that is missing or has a value that is impossible; or if a TPU slice has hosts of which
            nothing tells.
    """
    explicit = {name: environment[name] for name in _EXPLICIT if environment.get(name)}
    if explicit.get("JAX_NUM_PROCESSES") == "1":
        return
    if not re.fullmatch(r"(\d+(,\d+)*)?", devices := environment.get("JAX_LOCAL_DEVICE_IDS", "")):
        raise ConfigError(f"environment variable JAX_LOCAL_DEVICE_IDS is {devices!r}; expected numbers of devices, such as 0,1")
    # JAX's own, a process's last beat of which may be half of this before its death: so ours comes first.
    connect = _without_proxies()(functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=int(4 * SILENCE)))
    if explicit:
        for name in _EXPLICIT:
            if name not in explicit:
                raise ConfigError(
                    f"environment variable {name} is not set, but {' and '.join(explicit)} is; several processes "
                    f"need {', '.join(_EXPLICIT)}, one process none of them"
                )
        address, count = explicit["JAX_COORDINATOR_ADDRESS"], _number("JAX_NUM_PROCESSES", explicit, 1, 2**31)
        index = _number("JAX_PROCESS_ID", explicit, 0, count)
        if not re.fullmatch(r".+:\d+", address):
            raise ConfigError(f"environment variable JAX_COORDINATOR_ADDRESS is {address!r}; expected host:port")
        connect(address, count, index, cluster_detection_method="deactivate")
    elif "SLURM_STEP_NODELIST" in environment and (count := _slurm_tasks(environment)) > 1:
        address, index = _slurm_coordinator(environment), _number("SLURM_PROCID", environment, 0, count)
        connect(address, count, index, local_device_ids=_slurm_gpus(environment), cluster_detection_method="slurm")
    elif cloud_tpu_init.running_in_cloud_tpu_vm:
        _join_tpu_hosts(environment, connect)


def _join_tpu_hosts(environment: Mapping[str, str], connect: Callable[..., None]) -> None:
    """Connects the hosts of one or several TPU slices."""
    connect = functools.partial(connect, initialization_timeout=_BOOT)
    hosts = told_addresses(environment)
    if len(hosts) > 1 or "MEGASCALE_NUM_SLICES" in environment:
        if hosts:
            _number("TPU_WORKER_ID", environment, 0, len(hosts))
        if environment.get("TPU_PROCESS_ADDRESSES_PATH"):
            os.environ["TPU_PROCESS_ADDRESSES"] = ",".join(hosts)  # where JAX before 0.12 looks
        connect()
        return
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environment:
        try:
            return connect()
        except (ValueError, OSError) as error:  # JAX knows no such machine, or there are no metadata
            if isinstance(error, ValueError) and "coordinator_address" not in str(error):
                raise
        if (peers := instance_group_peers()) is not None:
            return connect(*peers, cluster_detection_method="deactivate")
    require_alone(environment)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """An environment without proxies: gRPC would reach even this machine through them, or hang."""
    proxies = {name: os.environ.pop(name) for name in _GRPC_PROXIES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(proxies)  # for downloads and buckets


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of a step. In the shell of an allocation, SLURM_NTASKS is that of the job."""
    return _number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS", environment, 1, 2**31)


def _slurm_coordinator(environment: Mapping[str, str]) -> str:
    """host:port of process 0: the first host of the step, and a port that is the step's own.

    JAX's own choice of the port is that of the job, so that two steps of it meet. Here jobs whose numbers, and steps whose
    numbers, are near each other have different ports; those of an array are jobs with numbers of their own.
    """
    first = re.match(r"(\[[^]]*\]|[^,[])*", environment["SLURM_STEP_NODELIST"])
    assert first is not None  # it may match nothing
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])  # "node[01-15,20]" are node01, …
    if environment.get("JAX_COORDINATOR_PORT"):
        return f"{host}:{_number('JAX_COORDINATOR_PORT', environment, 1, 2**16)}"
    job, step = (_number(name, environment, 0, 2**32) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"{host}:{_PORTS[(job * 127 + step) % len(_PORTS)]}"


def _slurm_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that a task sees it takes; None leaves that to JAX: JAX_LOCAL_DEVICE_IDS, or the one of its number.

    It takes all, which count from 0, where Slurm shows it its own alone (fewer than the job has on the node, or than there are
    tasks before it there), or no other task is on the node.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if environment.get("JAX_LOCAL_DEVICE_IDS") or not visible:
        return None
    count, on_node = len(visible.split(",")), environment.get("SLURM_GPUS_ON_NODE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    before = environment.get("SLURM_LOCALID", "")
    own = count < int(on_node) if on_node.isdecimal() else before.isdecimal() and count <= int(before)
    return list(range(count)) if alone or own else None


@contextlib.contextmanager
def failures_elsewhere(last_words: Callable[[str, bool], None]) -> Iterator[None]:
    """While this lasts, `last_words(reason, silent)` is called before this process ends because another one has failed.

    It still is after an error that looks like another process's: `processes` waits for the reason then.

    `silent` says that the other one gave no sign of life, so that nothing is known against starting the run again.
    """
    _LAST_WORDS.append(last_words)
    try:
        yield
    except BaseException as error:
        if not of_another_process(error):
            _LAST_WORDS.remove(last_words)
        raise
    _LAST_WORDS.remove(last_words)


def _number(name: str, environment: Mapping[str, str], low: int, end: int) -> int:
    value = environment.get(name, "")
    if not value.isdecimal() or not low <= int(value) < end:
        raise ConfigError(f"environment variable {name} is {value!r}; expected a number from {low} to {end - 1}")
    return int(value)


def of_another_process(error: BaseException | None) -> bool:
    """Whether there are others, and an error, or one that it came of, looks like what JAX raises where one of them is missing."""
    if global_state.num_processes == 1:
        return False
    while error is not None and not _STATUS.match(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def agree(problem: str | None) -> str | None:
    """What is wrong on any process, the same answer on all of them; None if nothing is. All have to call this."""
    if jax.process_count() == 1:
        return problem
    said = (problem or "").encode()[:_MESSAGE_BYTES]
    gathered = gather(np.frombuffer(said.ljust(_MESSAGE_BYTES, b"\0"), np.uint8))
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in gathered]
    return next(filter(None, texts), None)


def gather(tree: Any) -> Any:
    """Arrays of all processes, stacked along a new first axis. All have to call this; some may take long to come."""
    wait_for_all("gather")
    return multihost_utils.process_allgather(tree)


def of_process_0(what: str, value: str) -> str:
    """The value that process 0 has. All have to call this, with the same `what`; it is no collective operation."""
    if global_state.client is None:
        return value
    key = f"mimic_video/{what}/{_turn(what)}"
    if global_state.process_id == 0:
        global_state.client.key_value_set(key, value)
        return value
    return global_state.client.blocking_key_value_get(key, int(1000 * PATIENCE))


def wait_for_all(what: str) -> None:
    """Waits until all processes have come here, with the same `what`.

    On CPU, collective operations fail where a process is 30 s late; here it may be `PATIENCE`.
    """
    if global_state.client is not None:
        global_state.client.wait_at_barrier(f"mimic_video/{what}/{_turn(what)}", int(1000 * PATIENCE))


def _turn(what: str) -> int:
    _TURNS[what] += 1
    return _TURNS[what]


class _NumberedFormatter(logging.PythonFormatter):
    """Log lines begin with the number of their process."""

    def format(self, record) -> str:
        return f"[process {global_state.process_id}] {super().format(record)}"


class _Watch:
    """The thread that tells the others that this process lives, and ends it when another one fails."""

    def __init__(self):
        self._client: Any = global_state.client  # there is one: `initialize` has connected
        self._index, self._ending = global_state.process_id, threading.Event()
        self._name = f"process {self._index} on {socket.gethostname()}"
        self._heard: dict[str, tuple[str, float]] = {}  # last sign of life of each process, and when it came
        self._thread = threading.Thread(target=self._run, name="watch over other processes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leaves the run, as all processes do when it is over."""
        self._ending.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Tells the others, and ends this process."""
        if isinstance(error, SystemExit):
            text = str(error.code)
            print(text, file=sys.stderr)
        else:
            text = "".join(traceback.format_exception_only(error))
            traceback.print_exception(error)
        if of_another_process(error):  # of which there will be word
            print(f"{self._name} waits for the reason of other processes", file=sys.stderr, flush=True)
            time.sleep(SILENCE + 3 * _BEAT)
            for last_words in _LAST_WORDS:
                last_words(text, False)  # it was its own
        self._ending.set()
        self._publish(f"{self._name} stopped: {' '.join(text.removeprefix('error: ').split())}")
        self._exit(1)

    def _run(self) -> None:
        beats = 0
        while not self._ending.is_set():
            beats += 1
            try:
                self._client.key_value_set(f"{_ALIVE}/{self._name}", str(beats), allow_overwrite=True)
                if self._index == 0:
                    self._check()
                reason = self._client.blocking_key_value_get(_FAILURE, int(1000 * _BEAT))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):  # nobody failed
                    continue
                reason = f"process 0 cannot be reached: {str(error).splitlines()[0]}"
            if not self._ending.wait(_BEAT):  # time in which the main thread, too, may find the mistake, if all make it
                print(f"error: {reason}", file=sys.stderr)
                for last_words in _LAST_WORDS:
                    last_words(reason, _SILENT in reason)
                self._exit(OTHER_FAILED)

    def _check(self) -> None:
        """Publishes the failure of a process whose sign of life has not changed for too long."""
        now = time.monotonic()
        for name, beats in self._said(_ALIVE).items():
            if self._heard.get(name, ("",))[0] != beats:
                self._heard[name] = beats, now
            elif now - self._heard[name][1] > SILENCE:
                self._publish(f"{name} {_SILENT} for {SILENCE:.0f} s: it was killed, ran out of memory or lost its machine")

    def _said(self, what: str) -> dict[str, str]:
        """What each process has said of this, by its name."""
        return {key.rpartition("/")[2]: value for key, value in self._client.key_value_dir_get(what)}

    def _publish(self, reason: str) -> None:
        """The first reason is the one that all print."""
        try:
            self._client.key_value_set(_FAILURE, reason)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                print(f"error: the other processes cannot be told: {str(error).splitlines()[0]}", file=sys.stderr)

    def _let_others_leave(self) -> None:
        """Process 0 goes last: the others read the reason from it, and JAX aborts those that it leaves behind."""
        end = time.monotonic() + SILENCE  # some may have died, too
        while time.monotonic() < end:
            now = time.monotonic()
            silent = {name for name, (_, heard) in list(self._heard.items()) if now - heard > SILENCE}
            if len(self._said(_LEAVING).keys() | silent | {self._name}) == global_state.num_processes:
                break
            time.sleep(_BEAT / 4)
        time.sleep(_BEAT)  # from their word to their end

    def _exit(self, code: int) -> None:
        """Ends the process at once: its main thread may hang, and JAX's own end waits for processes that are gone."""
        if self._index == 0:
            self._let_others_leave()
        else:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, and waits for nobody
                self._client.key_value_set(f"{_LEAVING}/{self._name}", "", allow_overwrite=True)
        logging.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
