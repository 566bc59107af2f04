"""Two processes with two devices each, that have to decide alike."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import devices
import pytest

from mimic_video.runs import directory

ROOT = pathlib.Path(__file__).parents[2]

HOST = """
import os, pathlib, signal, sys, time
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import tiny
from mimic_video.config import MeshConfig
from mimic_video.runs import checkpoints
from mimic_video.training import loop
from mimic_video.training.preemption import PreemptedError
from mimic_video.runs.directory import locked
from mimic_video.parallel.sharding import make_mesh
from mimic_video.training.steps import abstract_state
from mimic_video.runs.storage import RunError

def say(*words):
    os.write(1, f"OUTCOME {' '.join(map(str, words))}\\n".encode())  # at once: threads of Gloo write there, too, in pieces

what, run = sys.argv[3], pathlib.Path(sys.argv[4])
config = tiny.experiment(train={"steps": 1000, "checkpoint_every": 2, "keep_checkpoints": 9}, mesh={"data": 1, "fsdp": 4})
me = jax.process_index()

def batches(start):
    step = start
    while True:
        step += 1
        if step == 3 and me == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield tiny.batch(config, config.train.batch_size, step)

if what == "train":
    try:
        loop.train(config, run, tiny.Data(config, batches))
    except PreemptedError as stopped:
        say(stopped)
elif what == "restore":
    target = abstract_state(tiny.model(config), make_mesh(config.mesh))
    with checkpoints.open_checkpoints(run, 9) as manager:
        say(int(checkpoints.restore(manager, target).step))
elif what == "late":
    from jax._src import compiler
    jax.config.update("jax_enable_compilation_cache", False)
    compile_now, compiled, late = compiler.backend_compile_and_load, [], set(sys.argv[5:])

    def compile_late(backend, module, *arguments):
        name = module.operation.attributes["sym_name"].value
        compiled.append(name)
        done = run.with_name(f"{name} of process 0")
        while me == 1 and name in late and not done.exists():
            time.sleep(0.1)
        if me == 1 and name in late:
            time.sleep(32)
        program = compile_now(backend, module, *arguments)
        if me == 0:
            done.touch()
        return program

    compiler.backend_compile_and_load = compile_late
    few = tiny.experiment(train={"steps": 2, "validate_every": 2})  # the step is the first that all four devices do together
    loop.train(few, run, tiny.Data(few, held_out=[tiny.batch(few, few.train.batch_size, 7)]))
    say(*(compiled.count(name) for name in ("jit_init", "jit_make_state", "jit_step", "jit_validate")))
else:
    try:
        with locked(run):
            pass
    except RunError as error:
        say(error)
"""


@pytest.fixture
def hosts(tmp_path):
    """hosts(what, other) → what each of the two processes has to say; the second one sees `other` as the run directory."""

    def run(what, other="run", arguments=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | devices.of_each(2) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [sys.executable, "-c", HOST, address]
        processes = [
            subprocess.Popen(
                [*command, str(index), what, tmp_path / name, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index, name in enumerate(("run", other))
        ]
        try:
            outputs = [process.communicate(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
        said = [re.findall("OUTCOME (.*)", out) for out, _ in outputs]
        assert all(len(lines) == 1 for lines in said), outputs
        return [line for (line,) in said]

    return run


@pytest.mark.processes
def test_all_stop_after_the_same_step_and_leave_a_checkpoint_that_only_one_cannot_read(hosts, tmp_path):
    one, other = hosts("train")  # only the second process gets a signal
    assert one == other
    stopped = int(re.search(r"stopped after step (\d+) of", one)[1])
    folder = tmp_path / "run" / "checkpoints"
    steps = sorted(int(path.name) for path in folder.iterdir())
    assert 3 <= stopped < 1000 and steps[-1] == stopped
    damaged = shutil.copytree(tmp_path / "run", tmp_path / "other") / "checkpoints" / str(stopped)
    shutil.rmtree(damaged / "params" / "d")
    assert hosts("restore", "other") == [str(steps[-2])] * 2
    assert sorted(path.name for path in folder.iterdir() if not path.name.isdigit()) == [f"{stopped}.damaged"]


@pytest.mark.processes
def test_a_process_may_compile_for_longer_than_collective_operations_wait(hosts):
    """Gloo's, of CPUs, wait for 30 s. What is compiled before is what runs."""
    assert hosts("late", arguments=["jit_step"]) == ["1 1 1 1"] * 2


@pytest.mark.processes
def test_no_process_runs_in_a_directory_that_is_taken(hosts, tmp_path):
    with directory.locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
        one, other = hosts("lock")
    assert one == other and f"process {os.getpid()} on" in one
