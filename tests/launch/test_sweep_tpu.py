"""Runs on Cloud TPU: gcloud itself against an API on this machine (tests/fake_tpu_api.py), a bucket here, and real training.

Of a host, the start-up script is run whole; launch/setup.sh and gcsfuse are replaced, since nothing is installed or mounted here.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import devices
import fake_tpu_api
import pytest
import tiny
from buckets import emulated_bucket
from sweeps import points, tpu

from data_pipelines.writers import write_rlds
from mimic_video.config import ConfigError, to_dict
from mimic_video.runs.directory import read_metrics
from mimic_video.runs.status import read_status
from mimic_video.runs.storage import run_path

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
STEPS, CHECKPOINT_EVERY = 20, 4
DEADLINE = 240  # seconds that anything may take

LAUNCHER = """
import sys
from sweeps import points, tpu
workdir, slices = sys.argv[1:]
tpu.COPIES = 2
found, _ = points.expand(["--config=configs/tiny.py"], [] if slices == "2" else None)
options = tpu.Options("v5litepod-4", slices=int(slices), jobs=1)
sys.exit(tpu.run(points.jobs(found, workdir, False), workdir, options, poll=0.3))
"""
SETUP = f"""#!/bin/bash
cd "$(dirname "$0")/.."
mkdir -p .venv/bin
printf '#!/bin/bash\\nexport PYTHONPATH=%q\\nexec {sys.executable} "$@"\\n' "$PWD" >.venv/bin/python
chmod +x .venv/bin/python
echo "extras $1"
"""
GCSFUSE = """#!/bin/bash
ln -sfn "$(dirname "$0")/buckets/$2"/* "$3"
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The working tree, as a clone of its own, in which setting up takes no time, with an experiment and a sweep of seeds."""
    folder = tmp_path_factory.mktemp("clone")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if name.partition("/")[0] in ("mimic_video", "data_pipelines", "launch", "setup.py") and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    train = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "log_every": 1}
    data = {"video_dataset": "gs://bucket/data/tiny/1.0.0"}
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.py").write_text(
        "import ml_collections\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({to_dict(tiny.experiment(stage='video', train=train, data=data))!r})\n"
        "\ndef sweep():\n    yield {'seed': 1}\n    yield {'seed': 2, 'data.video_dataset': 'gs://bucket/data/none'}\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a"], cwd=folder, check=True)
    (folder / "launch" / "setup.sh").write_text(SETUP)  # a change that is not committed
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The environment of hosts: what their command line finds."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "gcsfuse").write_text(GCSFUSE)
    (folder / "gcsfuse").chmod(0o755)
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((14, 25, 11))]}
    write_rlds(
        folder / "buckets" / "bucket" / "data", "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."
    )
    return {"PATH": f"{folder}:{os.environ['PATH']}", **devices.of_each(2)}


@pytest.fixture
def bucket():
    with emulated_bucket() as url:
        yield url


@pytest.fixture
def cloud(bucket, hosts, tmp_path, monkeypatch):
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed here")
    with fake_tpu_api.Cloud(tmp_path / "machines", os.environ | hosts) as api:
        for name, value in fake_tpu_api.environment(tmp_path / "gcloud", api.port).items():
            monkeypatch.setenv(name, value)
        yield api


class Launcher:
    """launch/sweep.py's loop, in a process of its own; `printed` is what it has said so far."""

    def __init__(self, clone, output, workdir, slices=1):
        self.output = output
        command = [sys.executable, "-c", LAUNCHER, workdir, str(slices)]
        environment = os.environ | {"PYTHONPATH": f"{clone}:{clone / 'launch'}"}
        with output.open("a") as file:
            self.process = subprocess.Popen(command, cwd=clone, env=environment, stdout=file, stderr=file)

    @property
    def printed(self):
        return self.output.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def end(self):
        return self.process.wait(DEADLINE)

    def until(self, reached, what):
        deadline = time.monotonic() + DEADLINE
        while not reached():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, f"{what}: {self.printed}"
            time.sleep(0.1)


def test_a_run_survives_its_machine_and_the_launcher_and_one_that_fails_is_reported(clone, cloud, bucket, tmp_path):
    workdir, output = f"{bucket}/sweep", tmp_path / "output.txt"
    run = run_path(f"{workdir}/seed=1")
    mistaken = points.jobs(points.expand([f"--config={ROOT / 'configs' / 'pretrain.py'}:video_v5e"], None)[0], workdir, False)
    with pytest.raises(ConfigError, match="must multiply to the 4 devices"):
        tpu.run(mistaken, workdir, tpu.Options("v5litepod-4"))
    assert not cloud.requests and not (run_path(workdir) / "code").exists()

    quota = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Quota limit has been exceeded."}}
    cloud.refusals.append((429, quota))
    with Launcher(clone, output, workdir) as launcher:
        launcher.until((run / "checkpoints" / str(CHECKPOINT_EVERY)).exists, "training")
        os.kill(launcher.process.pid, signal.SIGKILL)
    assert "trying again: ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota" in launcher.printed
    (name,) = cloud.resources
    cloud.preempt(name, notice=60)  # while nobody watches
    stopped = read_status(run)
    assert stopped.state == "stopped" and CHECKPOINT_EVERY <= stopped.step < STEPS
    assert any(path.name.startswith("jit_") for path in (run_path(workdir) / "compilation_cache").iterdir())

    with Launcher(clone, output, workdir) as launcher:
        assert launcher.end() == 1, launcher.printed
    finished = read_status(run)
    assert (finished.state, finished.step, finished.starts) == ("finished", STEPS, 2)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))
    (other,) = {request.split()[1] for request in cloud.requests} - {name}
    assert cloud.requests == [
        f"create {name}",  # refused
        f"create {name}",
        f"delete {name} which is SUSPENDED",
        f"create {name}",
        f"delete {name} which is ACTIVE",
        f"create {other}",
        f"delete {other} which is ACTIVE",
    ]
    assert not cloud.resources and not cloud.nodes
    assert "1 of 2 runs are finished\nfailed: seed=2,video_dataset=" in launcher.printed
    assert "bucket/data/none does not exist; logs of its hosts are in gs://bucket/sweep/seed=2," in launcher.printed
    assert "not committed are part of the code: 1 files" in launcher.printed  # launch/setup.sh, which ran:
    logs = sorted((run / "logs").glob("*.txt"))
    assert len(logs) == 2 and [log.name.split("-20")[0] for log in logs] == [f"{name}-node1", f"{name}-node2"]
    assert "ends with exit code 75" in logs[0].read_text() and "ends with exit code 0" in logs[1].read_text()
    assert "extras tpu,data,gcs" in logs[0].read_text()


def test_two_slices_train_as_one_and_nothing_is_left_of_what_is_stopped(clone, cloud, bucket, tmp_path):
    workdir, run = f"{bucket}/single", run_path(f"{bucket}/single")
    cloud.moved[f"{workdir}/compilation_cache"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
    with Launcher(clone, tmp_path / "output.txt", workdir, slices=2) as launcher:
        launcher.until((run / "checkpoints" / str(CHECKPOINT_EVERY)).exists, "training")
        (name,) = cloud.resources
        cloud.preempt(name)  # without a word
        assert launcher.end() == 0, launcher.printed
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))
    assert read_status(run).starts == 2 and not cloud.resources and not cloud.nodes
    once = [f"create {name}", f"delete {name} which is SUSPENDED", f"create {name}", f"delete {name} which is ACTIVE"]
    assert cloud.requests == once
    assert len(list((run / "logs").glob("*.txt"))) == 4

    options = tpu.Options("v5litepod-4", slices=2)
    tpu.QueuedResources.of_environment().create(name, options, "sleep 1000")
    job = points.Job(workdir, name, tiny.experiment(), (), {}, {})
    assert tpu.stop([job], poll=0.1) == 0
    assert cloud.requests[len(once) :] == [f"create {name}", f"delete {name} which is ACTIVE"]  # a machine that runs
    assert not cloud.resources and not cloud.nodes
