"""launch/sweeps/sky.py: its YAML, which SkyPilot itself reads where it is installed, and its commands, which a stand-in takes."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny
import yaml
from buckets import emulated_bucket
from documented import CLOUD, commands
from sweeps import hosts, points, sky

from mimic_video.config import ConfigError, to_dict

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = "docs/sweeps.md"
GOLDEN = ROOT / "tests" / "golden" / "sky_dry_run.yaml"
WORKDIR = "gs://bucket/sweep"
DATA = {"video_dataset": "gs://data/tiny/1.0.0", "action_dataset": "gs://data/tiny/1.0.0"}
GPUS, TPUS = sky.Options("gcp/us-central1", "H100:8", nodes=2), sky.Options("gcp/us-west4", "tpu-v5litepod-16", spot=False)


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """jobs(*points, workdir=, evaluate=, **changes of the experiment) → jobs of a sweep in a clone that is `tmp_path`."""
    file = tmp_path / "configs" / "robot.py"
    file.parent.mkdir()
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    monkeypatch.setattr(hosts, "tracked_files", lambda: [file])
    monkeypatch.setattr(sky, "remaining", lambda job: job.commands)  # the bucket is not there
    monkeypatch.chdir(tmp_path)

    def make(*values, workdir=WORKDIR, evaluate=False, **changes):
        config = tiny.experiment(**{"data": DATA, "train": {"batch_size": 16}} | changes)
        lines = ["import ml_collections", "def get_config():", f"    return ml_collections.ConfigDict({to_dict(config)!r})"]
        file.write_text("\n".join([*lines, "def sweep():", f"    yield from {list(values)!r}", ""]))
        return points.jobs(points.expand(["--config=configs/robot.py"], None)[0], workdir, evaluate)

    return make


def read(text):
    return list(yaml.safe_load_all(text))


def test_the_yaml_is_the_golden_one(jobs, tmp_path):
    gpus = sky.dry_run(jobs({"seed": 1}, {"seed": 2}, evaluate=True), WORKDIR, GPUS)
    tpus = sky.dry_run(jobs({"seed": 1}), WORKDIR, TPUS)
    text = f"{gpus}---\n{tpus}".replace(str(tmp_path), "/clone")
    assert text == GOLDEN.read_text(), f"to accept it: {GOLDEN} is to be what the dry run prints"


@pytest.mark.parametrize(("name", "runtime"), [("v5litepod-16", "v5-lite"), ("v5p-16", "v5"), ("v6e-16", "v6e")])
def test_slices_have_the_runtime_of_their_chip(jobs, name, runtime):
    (task,) = read(sky.dry_run(jobs({}), WORKDIR, sky.Options("gcp/us-west4", f"tpu-{name}")))
    assert task["resources"]["accelerator_args"] == {"runtime_version": f"v2-alpha-tpu{runtime}"}


def test_the_document_has_jobs_that_machines_could_do(launch, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [shlex.split(command)[2:] for command in commands(DOCUMENT, CLOUD) if "--on=sky" in command]
    with emulated_bucket() as bucket:
        for given in found:
            printed = launch("sweep", *(argument.replace("gs://my-bucket", bucket) for argument in given), "--dry_run")
            tasks = read(printed[printed.index("name: ") :])
            assert len(tasks) == 3 and all(f"--accelerators={task['resources']['accelerators']}" in given for task in tasks)
    assert len(found) == 2


# What SkyPilot is told a node is, and what is run in place of Python: it prints its arguments and its part in the run.
NODES = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
FAKE = """#!/bin/sh
for each in "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID" "$@"; do printf '%s\\0' "$each"; done
printf '\\n'
exit $CODE
"""


@pytest.fixture
def run_on(tmp_path):
    """run_on(task, rank, code of Python) → exit code, and of each command what the fake Python prints."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE)
    python.chmod(0o755)

    def run(task, rank, code):
        environment = {"PATH": os.environ["PATH"], "CODE": str(code), "SKYPILOT_NODE_RANK": str(rank), **NODES}
        done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, [line.split("\0") for line in done.stdout.split("\0\n")[:-1]]

    return run


TEXT = "a b,c=(1)\"'$HOME`pwd`\\%;{}*  "


def test_all_nodes_train_as_one_run_and_the_first_one_evaluates(jobs, run_on):
    (job,) = jobs({"text.model": TEXT}, evaluate=True)
    (task,) = read(sky.dry_run([job], WORKDIR, GPUS))
    folder = f"--config.data.action_dataset={hosts.MOUNTS}/data/tiny/1.0.0"
    code, ran = run_on(task, 1, 0)
    assert code == 0 and [command[:4] for command in ran] == [["10.0.0.1:12355", "2", "1", "launch/train.py"]]
    assert f"--config.text.model={TEXT}" in ran[0]
    assert folder in ran[0]
    code, ran = run_on(task, 0, 0)
    assert code == 0 and [command[1:4] for command in ran] == [["2", "0", "launch/train.py"], ["1", "0", "launch/evaluate.py"]]
    assert f"--config.text.model={TEXT}" in ran[1] and folder in ran[1]
    for code in (1, 75):
        ended, ran = run_on(task, 0, code)
        assert ended == code and len(ran) == 1


REFUSED = {  # what is said → workdir and options
    "--workdir is 'runs/sweep'; expected gs://BUCKET/FOLDER, which all machines reach": ("runs/sweep", GPUS),
    "--workdir is 'gs://bucket'; expected gs://BUCKET/FOLDER": ("gs://bucket", GPUS),
    "--infra is 'gcp'; expected CLOUD/REGION with the bucket's region, such as gcp/us-west4": (
        WORKDIR,
        sky.Options("gcp", "H100:8"),
    ),
    "--infra is 'gcp/*'; expected CLOUD/REGION": (WORKDIR, sky.Options("gcp/*", "H100:8")),
    "--accelerators is '8 GPUs'; expected NAME:COUNT, such as H100:8": (WORKDIR, sky.Options("gcp/r", "8 GPUs")),
    "expected GPUs, such as H100:8, or one of tpu-v5litepod-1, tpu-v5l": (WORKDIR, sky.Options("gcp/r", "tpu-v5e-16")),
    "--nodes is 2 with tpu-v6e-8; expected 1, as SkyPilot does not join": (WORKDIR, sky.Options("gcp/r", "tpu-v6e-8", nodes=2)),
    "1 x H100:3, gs://bucket/sweep: config field 'train.batch_size' is 16; ": (WORKDIR, sky.Options("gcp/r", "H100:3")),
}


@pytest.mark.parametrize(("expected", "workdir", "options"), [(said, *given) for said, given in REFUSED.items()])
def test_what_machines_could_not_do_is_refused(jobs, expected, workdir, options):
    with pytest.raises(ConfigError) as error:
        sky.dry_run(jobs({}, workdir=workdir), workdir, options)
    assert expected in str(error.value)


def test_tpus_do_not_evaluate_and_data_are_in_buckets(jobs):
    with pytest.raises(ConfigError, match="to be evaluated after its training, but hosts of TPUs have no simulator"):
        sky.dry_run(jobs({}, evaluate=True), WORKDIR, TPUS)
    with pytest.raises(ConfigError, match=r"'data\.action_dataset' has '/data/tiny'; expected gs://BUCKET/FOLDER"):
        sky.dry_run(jobs({}, data={"action_dataset": "/data/tiny"}), WORKDIR, GPUS)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A `sky` that keeps the YAML of jobs that it was given, and fails as the file `failing` says. Returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sky").write_text(f"""#!{sys.executable}
import json, pathlib, re, sys
folder, command = pathlib.Path({str(folder)!r}), sys.argv[1:3]
if (folder / "failing").exists():
    sys.exit("no credentials\\n" + (folder / "failing").read_text())
jobs = {{path.stem: path for path in folder.glob("*.yaml")}}
if command == ["jobs", "launch"]:
    text = pathlib.Path(sys.argv[-1]).read_text()
    (folder / (re.match("name: (.*)", text)[1] + ".yaml")).write_text(text)
elif command == ["jobs", "cancel"]:
    jobs[sys.argv[-1].removeprefix("--name=")].unlink()
else:
    print("\\x1b[2mStarting a local server.")
    print(json.dumps([{{"job_name": name}} for name in jobs], indent=2))
""")
    (folder / "sky").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_jobs_are_handed_over_once_and_cancelled(jobs, stand_in, capsys):
    made = jobs({"seed": 1}, {"seed": 2})
    assert sky.submit(made, WORKDIR, GPUS) == 0
    given = {job.name: (stand_in / f"{job.name}.yaml").read_text() for job in made}
    assert "---\n".join(given.values()) == sky.dry_run(made, WORKDIR, GPUS)
    sky.submit(made, WORKDIR, GPUS)
    assert capsys.readouterr().out.endswith("0 of 2 runs were handed over; 2 had been before\n")
    assert sky.stop(made[1:]) == 0
    assert [path.stem for path in stand_in.glob("*.yaml")] == [made[0].name]


def test_what_skypilot_says_in_its_way_is_understood(jobs, stand_in):
    (stand_in / "failing").write_text("sky.exceptions.ClusterNotUpError: No in-progress managed jobs.")
    assert sky.stop(jobs({})) == 0
    (stand_in / "failing").write_text("sky.exceptions.Other: why")
    with pytest.raises(ConfigError, match=r"sky jobs queue ended with exit code 1: sky\.exceptions\.Other: why"):
        sky.submit(jobs({}), WORKDIR, GPUS)
    (stand_in / "sky").unlink()
    if shutil.which("sky") is None:
        with pytest.raises(ConfigError, match="there is no sky; expected SkyPilot, as after pip install"):
            sky.stop(jobs({}))


# What SkyPilot makes of each YAML. Its server reads job_recovery with care, once it has its plugins; a client passes anything on.
READ = """
import json, os, sys, yaml
os.environ["IS_SKYPILOT_SERVER"] = "1"
import sky
from sky.server import plugins
plugins.plugins_loaded = lambda: True
found = []
for config in yaml.safe_load_all(sys.stdin):
    task = sky.Task.from_yaml_config(config)
    (resources,) = task.resources
    found.append([task.name, task.num_nodes, resources.region, resources.accelerators, resources.accelerator_args])
    found[-1] += [resources.use_spot, resources.job_recovery, sorted(task.storage_mounts), task.setup, task.run]
json.dump(found, sys.stdout)
"""


@pytest.mark.reference
def test_skypilot_reads_what_is_meant(tmp_path):
    command = shutil.which("sky")
    if command is None:
        pytest.skip("there is no sky; expected SkyPilot, as after pip install 'skypilot[gcp]' in an environment that is on PATH")
    python = str(pathlib.Path(command).resolve().with_name("python"))
    environment = {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PATH": os.environ["PATH"]}

    def read_by_sky(text):
        return subprocess.run([python, "-c", READ], input=text, env=environment, capture_output=True, text=True)

    text = GOLDEN.read_text().replace("/clone", str(tmp_path))
    done = read_by_sky(text)
    assert done.returncode == 0, done.stderr
    gpus, tpus = json.loads(done.stdout)[0], json.loads(done.stdout)[-1]
    recovery = {"strategy": "FAILOVER", "max_restarts_on_errors": 2, "recover_on_exit_codes": [75]}
    assert gpus[1:8] == [2, "us-central1", {"H100": 8}, None, True, recovery, ["/gcs/data"]]
    runtime = {"runtime_version": "v2-alpha-tpuv5-lite"}
    assert tpus[1:8] == [1, "us-west4", {"tpu-v5litepod-16": 1}, runtime, False, recovery, ["/gcs/data"]]
    for task, config in zip(json.loads(done.stdout), read(text), strict=True):
        assert [task[0], *task[-2:]] == [config["name"], config["setup"], config["run"]]
    done = read_by_sky(text.replace("recover_on_exit_codes", "recover_on_exit_code"))
    assert done.returncode and "recover_on_exit_code" in done.stderr
