"""Notices that this machine is about to go: signals, and what Google Compute Engine announces to its machines.

A run that is asked to stop finishes its step, saves, waits until that is written and ends with exit code `EXIT_CODE`; the same
command then continues it.
"""

import contextlib
import os
import pathlib
import signal
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

from mimic_video.parallel.metadata import open_metadata

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: saved, start me again

_PRODUCT_NAME = pathlib.Path("/sys/class/dmi/id/product_name")
# Of the metadata server, and what says that the machine stops. Without TERMINATE, maintenance moves it while it runs.
_ANNOUNCEMENTS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_POLL_SECONDS, _RETRY_SECONDS = 60, 10


class PreemptedError(RuntimeError):
    """Training was asked to stop, and its state is saved; the same command continues it."""


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Before a run of one process takes its first step, SIGTERM ends it with a PreemptedError, as there is nothing to save.

    While `preemption_notices` lasts, it has the signal. Of several processes JAX's coordination service has it from the start.
    """
    if jax.process_count() > 1:
        yield
        return

    def end(*_: object) -> None:
        raise PreemptedError("stopped before the first step, as asked; the same command starts again")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def preemption_notices() -> Iterator[Callable[[int], bool]]:
    """Gives `stop_after(step)`: whether training ends after this step because SIGTERM, SIGINT or the cloud asked for it.

    All processes have to ask after every step, from the same step on, and then stop after the same one, whichever of them was
    asked. In one process the first SIGINT (Ctrl-C) counts as a notice; in any, the second one kills. To be used in the main
    thread.
    """
    asked, done = threading.Event(), threading.Event()
    several = jax.process_count() > 1  # then SIGTERM belongs to JAX's coordination service, which has all agree on a step

    def notice(number: int, _) -> None:
        logging.warning("%s: finishing the step and saving", signal.Signals(number).name)
        asked.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if several:
                os.kill(os.getpid(), signal.SIGTERM)

    def stop_after(step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) if several else asked.is_set()

    handled = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, notice) for number in handled}
    host = _metadata_host()
    for name, value in _ANNOUNCEMENTS.items() if host else ():
        threading.Thread(target=_watch, args=(host, name, value, done), daemon=True).start()
    try:
        yield stop_after
    finally:
        done.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _metadata_host() -> str | None:
    """Where Google Compute Engine's metadata server is, on its machines."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    on_google = _PRODUCT_NAME.exists() and _PRODUCT_NAME.read_text().startswith("Google")
    return "169.254.169.254" if on_google else None


def _watch(host: str, name: str, announced: str, done: threading.Event) -> None:
    """Waits for the metadata server to say `announced`, and turns it into a SIGTERM to this process."""
    etag, warned = "0", False
    while not done.is_set():
        query = urllib.parse.urlencode({"wait_for_change": "true", "last_etag": etag, "timeout_sec": _POLL_SECONDS})
        url = f"http://{host}/computeMetadata/v1/instance/{name}?{query}"
        try:
            with open_metadata(url, timeout=2 * _POLL_SECONDS) as answer:
                value, etag = answer.read().decode().strip(), answer.headers.get("ETag", "0")
        except OSError as error:
            if not warned:
                logging.warning("notices of preemption cannot be read from %s, trying again: %s", url, error)
            warned = True
            done.wait(_RETRY_SECONDS)
            continue
        if value == announced and not done.is_set():
            logging.warning("Google Compute Engine announces %s: %s", name, value)
            os.kill(os.getpid(), signal.SIGTERM)
            return
