import pathlib
import signal
import socket
import subprocess
import sys
import urllib.request

import jax
import numpy as np
import pytest
import tiny

from mimic_video.embodiments import Embodiment
from mimic_video.policy.policy import Policy
from mimic_video.runs import checkpoints, directory
from mimic_video.stages import split_params
from mimic_video.training.steps import make_state
from mimic_video.transforms import compute_statistics
from mimic_video_client import PolicyClient, RequestRefused, ServerUnavailable

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of stage `action`."""
    folder, config = tmp_path_factory.mktemp("run"), tiny.experiment()
    statistics = {
        "action": compute_statistics(np.random.default_rng(0).normal([5, -3], [0.1, 2.0], (200, 4, 2))),
        "proprio": compute_statistics(np.random.default_rng(1).normal(1.0, 2.0, (200, 1, 3))),
    }
    directory.write_config(folder, config)
    trained, frozen = split_params(tiny.params(config), config)
    checkpoints.save_frozen(folder, frozen)
    state = make_state(config, jax.tree.map(np.zeros_like, trained)).replace(step=np.int32(4), ema=trained)
    with checkpoints.open_checkpoints(folder, 1) as manager:
        checkpoints.save(manager, jax.device_put(state), data={})
    directory.save_embodiments(folder, {"arm": Embodiment("arm", 0, statistics, {"action": (), "proprio": ()})})
    return folder


def start(*arguments):
    command = [sys.executable, "launch/serve.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_policy_is_served_until_it_is_told_to_end(run):
    rename = "--rename=observation.images.front=images.primary"
    options = ("--client=openpi_libero", "--prompt=wait", "--episode_gap=2")
    process = start(f"--policy={run}", "--port=0", "--token=secret", "--batch_size=2", rename, *options)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving 'arm' at ws://127.0.0.1:"), line + process.stderr.read()
        uri = line.split()[-1]
        with pytest.raises(ServerUnavailable, match="401"):
            PolicyClient(uri)
        with PolicyClient(uri, token="secret", timeout=120.0) as client:
            assert client.told("client", "prompt", "episode_gap_seconds") == ["openpi_libero", "wait", 2]
            images = np.random.default_rng(0).integers(0, 256, (2, 5, *tiny.SIZE, 3), np.uint8)
            proprio = np.ones((2, 3), np.float32)
            message = {"observation.images.front": images, "observation.state": proprio, "task": "do it", "robots": 2, "query": 1}
            actions = client.infer(message)["actions"]
            np.testing.assert_allclose(actions, Policy.load(run)(images, proprio, ["do it"] * 2, 1), rtol=1e-4, atol=1e-5)
            with pytest.raises(RequestRefused, match=r"bad_request: .* has 5 words; text\.rows is 4"):
                client.infer(message | {"task": "far too many words here"})
            with urllib.request.urlopen(uri.replace("ws:", "http:") + "/healthz", timeout=60) as response:
                assert response.read() == b"ok\n"
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and "draining" in output and "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_is_told_before_the_policy_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(f"--policy={tmp_path / 'not_even_there'}", f"--port={port}")
        _, errors = process.communicate(timeout=120)
    assert errors.splitlines()[-1].startswith(f"error: port {port} of '127.0.0.1' cannot be listened at: ")
    assert process.returncode == 1 and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rename=front"], "--rename='front' is not of the form NAME=KNOWN"),
        ([], "is not a run directory"),
        (["--port=65536"], "error: port is 65536; expected 0 to 65535"),
        (["--host=192.0.2.1"], "error: port 8000 of '192.0.2.1' cannot be listened at: "),
    ],
)
def test_mistakes_are_told(tmp_path, arguments, complaint):
    process = start(f"--policy={tmp_path}", *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and complaint in errors and "Traceback" not in errors
