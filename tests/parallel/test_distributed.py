"""How processes find each other, and that they hold the same arrays as one process would."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import devices
import jax
import pytest

from mimic_video.config import ConfigError
from mimic_video.parallel.distributed import (
    _BEAT,
    OTHER_FAILED,
    _slurm_coordinator,
    _slurm_gpus,
    global_state,
    initialize,
    of_another_process,
    processes,
)
from mimic_video.runs.storage import RunError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_COORDINATOR_ADDRESS is not set, but JAX_NUM_PROCESSES is"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES is not set, but JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID is",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4"}, "JAX_PROCESS_ID is not set"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID is '4'; expected a number from 0 to 3",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "four", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES is 'four'",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS is 'host'",
        ),
        ({"JAX_LOCAL_DEVICE_IDS": "0;1"}, "JAX_LOCAL_DEVICE_IDS is '0;1'; expected numbers of devices, such as 0,1"),
        ({"SLURM_STEP_NODELIST": "host[1-4]", "SLURM_NTASKS": "?"}, r"SLURM_NTASKS is '\?'"),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, r"SLURM_STEP_ID is ''"),
        (
            {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": "x"},
            "JAX_COORDINATOR_PORT is 'x'; expected a number from 1 to 65535",
        ),
    ],
)
def test_half_set_and_impossible_variables_are_named(environment, message):
    with pytest.raises(ConfigError, match=f"environment variable {message}"):
        initialize(environment)


@pytest.mark.parametrize(
    ("visible", "on_node", "tasks", "taken"),
    [
        ("0,1,2,3", "4", "4", None),  # all tasks see all GPUs: JAX takes that of the task's number
        ("0", "2", "2", [0]),  # --gpus-per-task=1, as a real Slurm says it to either task
        ("1", "2", "2", [0]),
        ("2,3", "4", "2(x2)", [0, 1]),  # --gpus-per-task=2
        ("0,1,2,3", "4", "1(x2)", [0, 1, 2, 3]),  # one task a node
        ("0,1", None, "2", None),  # GPUs that Slurm does not know
        ("0", None, "4", [0]),  # but three tasks before this one cannot have had one each
        (None, None, "2", None),  # no GPUs
    ],
)
def test_tasks_of_slurm_take_the_gpus_that_are_their_own(visible, on_node, tasks, taken):
    variables = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node, "SLURM_STEP_TASKS_PER_NODE": tasks}
    environment = {name: value for name, value in variables.items() if value} | {"SLURM_LOCALID": "1"}
    assert _slurm_gpus(environment) == taken
    assert _slurm_gpus(environment | {"JAX_LOCAL_DEVICE_IDS": "1,0"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("a,b[1-2]", "a"),
        ("node[007-015,020],host2", "node007"),
        ("node[3,5]", "node3"),
        ("rack[1-2]node[04-05]", "rack1node04"),
        ("tpu-[2-3]-ib,a", "tpu-2-ib"),
    ],
)
def test_process_0_of_a_slurm_step_is_on_its_first_host(nodes, first):
    environment = {"SLURM_STEP_NODELIST": nodes, "JAX_COORDINATOR_PORT": "5000"}
    assert _slurm_coordinator(environment) == f"{first}:5000"


def test_neighbouring_jobs_and_steps_of_slurm_have_ports_of_their_own():
    ports = [
        int(_slurm_coordinator({"SLURM_STEP_NODELIST": "a", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})[2:])
        for job in range(6_999_950, 7_000_040)
        for step in range(100)
    ]
    assert len(set(ports)) == len(ports) and min(ports) >= 20_000 and max(ports) < 32_000


def test_the_shell_of_an_allocation_is_one_process(monkeypatch):
    """As with `use_interactive_step`: it is a step of one task, in a job of four."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it waits for others"))
    initialize({"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"})


@pytest.mark.parametrize("environment", [{}, {"JAX_NUM_PROCESSES": "1"}, {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}])
def test_one_process_stays_by_itself(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="error: as it is"), processes():
        sys.exit("error: as it is")


def raised(error, cause):
    """The exit that a launch script makes of a RunError of something else, as it arrives in `processes`."""
    try:
        try:
            raise RunError(error) from cause
        except RunError as error:
            sys.exit(f"error: {error}")
    except SystemExit as exit:
        return exit


def test_errors_that_another_process_causes_are_known_by_what_they_came_of(monkeypatch):
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    assert not of_another_process(gone)  # there is none
    monkeypatch.setattr(global_state, "num_processes", 2)
    assert of_another_process(gone) and of_another_process(raised("step 4 could not be saved", gone))
    assert not of_another_process(raised("step 4 could not be saved", OSError(28, "No space left on device")))


HOST = """
import os
from mimic_video.parallel.distributed import processes
with processes():
    import jax
    import numpy as np
    import tiny
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import AxisType, Mesh
    from mimic_video.config import MeshConfig
    from mimic_video.parallel.sharding import batch_rows, global_batch, make_mesh, shardings
    from mimic_video.parallel.sharding import place
    from mimic_video.vam import VideoActionModel

    rows = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    chips = np.array(jax.devices())
    meshes = {
        "neighbours": make_mesh(MeshConfig()),
        "interleaved": Mesh(chips.reshape(2, 4).T.reshape(2, 4, 1), ("data", "fsdp", "sequence")),
        "one sample on both": make_mesh(MeshConfig(data=1, fsdp=1, sequence=8)),
        "samples on a part of both": Mesh(chips.reshape(2, 4).T.reshape(1, 4, 2), ("data", "fsdp", "sequence")),
    }
    for name, mesh in meshes.items():
        own = batch_rows(16, mesh)
        os.write(1, f"{name} {own}\\n".encode())  # at once: threads of Gloo write there, too, in pieces
        whole = global_batch({"x": rows[own]}, mesh)["x"]
        np.testing.assert_array_equal(process_allgather(whole, tiled=True), rows)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    vam = VideoActionModel(tiny.experiment())
    shapes = jax.eval_shape(vam.init, jax.random.key(0))
    params = jax.jit(vam.init, out_shardings=shardings(shapes, mesh))(jax.random.key(0))
    expected = jax.device_get(jax.jit(vam.init)(jax.random.key(0)))
    for tree in (params, place(expected, mesh)):
        for leaf, whole in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            for shard in leaf.addressable_shards:
                np.testing.assert_allclose(shard.data, whole[shard.index], rtol=1e-6)
        kernel = tree["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    raise SystemExit(3)  # a number: all end in good order
"""


@contextlib.contextmanager
def several(count, program):
    """Processes of four devices each that run `program`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        **devices.of_each(4),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment | {"JAX_PROCESS_ID": str(index)}, **pipes)
        for index in range(count)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.processes
def test_two_processes_hold_the_arrays_of_one():
    with several(2, HOST) as running:
        printed = [process.communicate(timeout=120)[0] for process in running]
    expected = {
        "neighbours": (list(range(8)), list(range(8, 16))),
        "interleaved": ([0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]),
        "one sample on both": (list(range(16)),) * 2,
        "samples on a part of both": (list(range(16)),) * 2,
    }
    for index, process in enumerate(running):
        assert process.returncode == 3, printed[index]
        for name, rows in expected.items():
            assert f"{name} {rows[index]}" in printed[index]


WAITS_FOR_A_MISTAKE = """
from mimic_video.parallel.distributed import processes
with processes():
    print("ready", flush=True)
    raise SystemExit(f"error: {input()}")
"""


@pytest.mark.processes
@pytest.mark.parametrize(("failing", "late"), [(1, 2), (0, 1)])
def test_process_0_waits_for_one_that_is_late(failing, late):
    with several(3, WAITS_FOR_A_MISTAKE) as running:
        for process in running:
            assert any(line == "ready\n" for line in process.stdout)
        running[late].send_signal(signal.SIGSTOP)
        running[failing].stdin.write("no data\n")
        running[failing].stdin.flush()
        time.sleep(5 * _BEAT)
        running[late].send_signal(signal.SIGCONT)
        printed = [process.stdout.read() for process in running]  # of their whole lives
        codes = [process.wait() for process in running]
    for index, code in enumerate(codes):
        assert "no data" in printed[index]
        assert code == (1 if index == failing else OTHER_FAILED), printed[index]


@pytest.mark.parametrize("variable", ["grpc_proxy", "http_proxy"])
def test_processes_reach_each_other_without_proxies(monkeypatch, variable):
    """gRPC would ask a proxy even for this machine; tests/launch/test_processes.py has one that is not there."""
    seen = []
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: seen.append(os.environ.get(variable)))
    initialize({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})
    assert seen == [None] and os.environ[variable] == "http://127.0.0.1:9"
