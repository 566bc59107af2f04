"""Where and with what a measurement was made: what a line of benchmarks/*.jsonl begins with."""

import datetime
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


def provenance() -> dict[str, Any]:
    """Date, commit (with a + if files differ from it), command, machine, and versions of Python and of JAX if it is in use."""
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} x {_cpu()}",
        "python": platform.python_version(),
    }
    if jax := sys.modules.get("jax"):
        found |= {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__}
    return found


def _git(*arguments: str) -> str:
    """What git prints; nothing where there is no git or no repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
