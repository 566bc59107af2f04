"""launch/sweeps/slurm.py: its script, which a shell runs here without Slurm; and arrays of a real Slurm of one node."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import devices
import pytest
import tiny
from documented import CLUSTER, commands
from slurm_cluster import slurm as cluster
from sweeps import points, slurm

from data_pipelines.writers import write_rlds
from mimic_video.config import ConfigError
from mimic_video.runs.directory import read_config, read_metrics
from mimic_video.runs.status import read_status
from mimic_video.runs.storage import RunError, run_path
from mimic_video.training.preemption import EXIT_CODE

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = "docs/slurm.md"
GOLDEN = ROOT / "tests" / "golden" / "slurm_dry_run.sh"
DEADLINE = 300  # seconds that anything may take
SWEEP = """
def sweep():
    for values in {values!r}:
        yield values
"""


@pytest.fixture
def jobs(config_file, tmp_path, monkeypatch):
    """jobs(*points, workdir=, evaluate=, **changes of the experiment) → jobs of a sweep; the experiment is robot.py of a folder
    that the test is in."""
    monkeypatch.chdir(tmp_path)

    def make(*values, workdir="runs/sweep", evaluate=False, **changes):
        shutil.copy(config_file(tiny.experiment(**changes)), "robot.py")
        with open("robot.py", "a") as file:
            file.write(SWEEP.format(values=list(values)))
        chosen, _ = points.expand(["--config=robot.py"], None)
        return points.jobs(chosen, workdir, evaluate=evaluate)

    return make


def test_the_script_is_the_golden_one(jobs, monkeypatch):
    made = jobs({"train.learning_rate": 1e-4}, {"train.learning_rate": 3e-4}, evaluate=True)
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    options = slurm.Options(
        ("--partition=gpu", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-task=1", "--time=4:00:00"), jobs=1
    )
    script = slurm.dry_run(made, "runs/sweep", options).replace(str(ROOT), "/clone")
    assert script == GOLDEN.read_text(), f"to accept it: {GOLDEN} is to be what the dry run prints"


def test_without_options_all_run_at_once_and_a_single_run_is_an_array_of_one(jobs):
    script = slurm.dry_run(jobs({}), "runs/sweep", slurm.Options())
    assert "#SBATCH --array=0-0\n" in script and "\n  runs/sweep/log.txt\n" in script


def test_texts_of_runs_in_a_bucket_are_on_the_file_system(jobs, monkeypatch):
    monkeypatch.setattr(slurm, "remaining", lambda job: job.commands)  # the bucket is not there
    script = slurm.dry_run(jobs({"seed": 1}, {"seed": 2}, workdir="gs://b/f"), "gs://b/f", slurm.Options())
    assert "--output=runs/b/f/slurm.txt\n" in script
    assert "\n  runs/b/f/seed=1/log.txt\n  runs/b/f/seed=2/log.txt\n" in script
    assert "--workdir=gs://b/f/seed=1" in script


def documented(program):
    """The arguments of a command of launch/, in all commands of the document that have it."""
    found = [shlex.split(command) for command in commands(DOCUMENT, CLUSTER) if f"launch/{program}" in command]
    return [[word for word in words[words.index(f"launch/{program}") + 1 :] if word != "&"] for words in found]


def test_the_document_has_arrays_that_a_shell_reads_and_runs_that_can_be_trained(config_file, launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").mkdir()
    shutil.copy(config_file(tiny.experiment()), "configs/quickstart.py")
    with open("configs/quickstart.py", "a") as file:
        file.write(SWEEP.format(values=[{"train.learning_rate": 1e-4}]).replace("sweep()", "sweep_lr()"))
        file.write(SWEEP.format(values=[{"seed": 1}, {"seed": 2}]).replace("sweep()", "sweep_seed()"))
    arrays = [given for given in documented("sweep.py") if "--on=slurm" in given and "--stop" not in given]
    for given in arrays:
        printed = launch("sweep", *dict.fromkeys([*given, "--dry_run"]))
        script = printed[printed.index("#!/bin/bash") :]
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        lines = [argument.removeprefix("--slurm=") for argument in given if argument.startswith("--slurm=")]
        assert all(f"#SBATCH {line}\n" in script for line in lines) and len(lines) == 4
    runs = documented("train.py")
    assert all("'action'" in launch("train", *given, "--show_config") for given in runs)
    assert len(arrays) == 2 and len(runs) == 5


# What is run in place of Slurm's commands and Python: it notes its arguments, and ends with a code that the test sets.
FAKE = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open({notes!r}, "a") as notes:
    keys = ("JAX_NUM_PROCESSES", "SRUN_CPUS_PER_TASK")
    notes.write(json.dumps([name, sys.argv[1:], [os.environ.get(key) for key in keys]]) + "\\n")
if name == "srun":
    print("of srun", flush=True)
    os.execv(sys.argv[2], sys.argv[2:])
sys.exit(int(os.environ.get("CODE_OF_" + name.split()[0], 0)))
"""


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """run_script(script, task, **environment) → exit code and what was run."""
    programs, notes = tmp_path / "bin", tmp_path / "notes"
    programs.mkdir()
    for name in ("srun", "scontrol", "sleep", "python of mine"):
        (programs / name).write_text(FAKE.format(python=sys.executable, notes=str(notes)))
        (programs / name).chmod(0o755)

    def run(script, task, **environment):
        notes.write_text("")
        variables = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n"}
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["bash"], input=script, text=True, env={**os.environ, "PATH": path, **variables, **environment})
        return done.returncode, [json.loads(line) for line in notes.read_text().splitlines()]

    monkeypatch.setattr(sys, "executable", str(programs / "python of mine"))
    return run


TEXT = """a b,c=(1)"'$HOME`pwd`\\%s\n;{}*"""


def test_a_shell_gets_every_character_of_values_and_folders(jobs, run_script):
    workdir = "runs/my sweep,n=(1)'\"%j$HOME"
    made = jobs({"seed": 1}, {"seed": 2, "train.wandb_project": TEXT}, workdir=workdir, evaluate=True)
    code, ran = run_script(slurm.dry_run(made, workdir, slurm.Options()), 1, SLURM_CPUS_PER_TASK="3")
    train, evaluate = ([str(ROOT / "launch" / command[0]), *command[1:]] for command in made[1].commands)
    assert any(TEXT in argument for argument in train) and f"--workdir={made[1].run}" in train
    assert code == 0 and ran == [
        ["srun", ["--kill-on-bad-exit=0", sys.executable, *train], [None, "3"]],
        ["python of mine", train, [None, "3"]],
        ["python of mine", evaluate, ["1", "3"]],
    ]
    log = pathlib.Path(made[1].run, "log.txt").read_text()
    assert "job 7_1 on n, started again 0 times\nof srun\n" in log


def test_training_that_was_told_to_stop_goes_back_into_the_queue(jobs, run_script):
    script = slurm.dry_run(jobs({"seed": 1}, {"seed": 2}, evaluate=True), "runs/sweep", slurm.Options())
    code, ran = run_script(script, 0, CODE_OF_python=str(EXIT_CODE))
    assert code == EXIT_CODE
    assert [name for name, *_ in ran] == ["srun", "python of mine", "scontrol", "sleep"]
    assert ran[2][1] == ["requeue", "incomplete", "7_0"]
    code, ran = run_script(script, 0, CODE_OF_python=str(EXIT_CODE), CODE_OF_scontrol="1")
    assert code == EXIT_CODE and [name for name, *_ in ran][-1] == "scontrol"


def test_what_fails_is_neither_evaluated_nor_started_again(jobs, run_script):
    script = slurm.dry_run(jobs({"seed": 1}, {"seed": 2}, evaluate=True), "runs/sweep", slurm.Options())
    code, ran = run_script(script, 1, CODE_OF_python="69")
    assert code == 69 and [name for name, *_ in ran] == ["srun", "python of mine"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("partition=gpu", "--slurm is 'partition=gpu'; expected an option of sbatch, such as --slurm=--partition=gpu"),
        ("--comment=a\nb", "expected an option of sbatch"),
        ("--array=0-7", "--slurm is '--array=0-7', but the array is the sweep's own; expected --jobs=N for N runs at once"),
    ],
)
def test_lines_that_are_no_options_are_refused(jobs, line, expected):
    with pytest.raises(ConfigError) as error:
        slurm.dry_run(jobs({}), "runs/sweep", slurm.Options((line,)))
    assert expected in str(error.value)


def test_where_there_is_no_slurm_the_message_says_so(jobs, monkeypatch, tmp_path):
    made = jobs({})
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (lambda: slurm.submit(made, "runs/sweep", slurm.Options()), lambda: slurm.stop(made, "runs/sweep")):
        with pytest.raises(ConfigError, match="--on=slurm, but there is no sbatch; expected Slurm's commands, as on a cluster's"):
            call()
    assert not pathlib.Path("runs").exists()


STEPS = 30


@pytest.fixture(scope="module")
def environment():
    with cluster() as environment:
        yield environment | devices.of_each(1) | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def in_cluster(environment, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SRUN_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((14, 25))]}
    folder = tmp_path_factory.mktemp("data")
    return str(write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))


def queue():
    """Task of Slurm → its state."""
    printed = subprocess.run(["squeue", "--noheader", "--array", "--format=%F_%K %T"], check=True, capture_output=True, text=True)
    return dict(line.split() for line in printed.stdout.splitlines())


def wait_until(true, explained):
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline, explained()
        time.sleep(0.1)


@pytest.mark.processes
def test_arrays_train_every_run_whatever_stops_them(jobs, data, in_cluster, capsys):
    def texts():
        told = [path.read_text() for path in [*folder.glob("*/log.txt"), folder / "slurm.txt"] if path.exists()]
        commands = (["scontrol", "show", "job"], ["sinfo", "--long"], ["sinfo", "--list-reasons"])
        return "\n".join(told + [subprocess.run(command, capture_output=True, text=True).stdout for command in commands])

    def submit():
        """The number of the array."""
        slurm.submit(made, str(folder), slurm.Options(("--partition=test", "--time=60"), jobs=1))
        number, runs = re.fullmatch(r"job (\d+) of Slurm has (\d) runs; .*\n", capsys.readouterr().out).groups()
        assert runs == "2" and json.loads((folder / "slurm.json").read_text())[number] == ["seed=1", "seed=2"]
        return number

    def trains(run):
        """Whether signals are noticed: the first step is being compiled, or later."""
        return (run / "frozen").exists()

    folder, train = pathlib.Path("runs/a sweep"), {"steps": STEPS, "checkpoint_every": STEPS}
    made = jobs({"seed": 1}, {"seed": 2}, workdir=str(folder), stage="video", train=train, data={"video_dataset": data})
    first, second = (pathlib.Path(job.run) for job in made)

    array = submit()
    wait_until(lambda: trains(first), texts)
    assert queue() == {f"{array}_0": "RUNNING", f"{array}_1": "PENDING"}
    slurm.submit(made, str(folder), slurm.Options())
    assert capsys.readouterr().out == "2 runs are in Slurm's queue already\nnothing to submit\n"
    slurm.stop(made, str(folder))
    assert capsys.readouterr().out == "cancelled in Slurm's queue: 2 of 2 runs\n"
    wait_until(lambda: not queue(), texts)
    assert read_status(run_path(first)).state == "stopped" and not second.exists()

    array = submit()
    wait_until(lambda: trains(second), texts)
    assert read_status(run_path(first)).state == "finished"
    subprocess.run(["scancel", "--signal=TERM", f"{array}_1"], check=True)
    wait_until(lambda: queue() == {f"{array}_1": "PENDING"}, texts)
    assert read_status(run_path(second)).state == "stopped"
    wait_until(lambda: read_status(run_path(second)).state == "finished", texts)  # on its way back squeue may not show it
    wait_until(lambda: not queue(), texts)

    for run, seed in ((first, 1), (second, 2)):
        assert read_config(run).seed == seed
        status = read_status(run_path(run))
        assert (status.state, status.starts) == ("finished", 2), texts()
        assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))
    assert f"job {array}_1 on" in (second / "log.txt").read_text() and "started again 1 times" in (second / "log.txt").read_text()
    slurm.submit(made, str(folder), slurm.Options())
    slurm.stop(made, str(folder))
    assert capsys.readouterr().out == "nothing to submit\ncancelled in Slurm's queue: 0 of 2 runs\n"


@pytest.mark.processes
def test_what_sbatch_refuses_is_said_in_its_words(jobs, in_cluster):
    made = jobs({})
    with pytest.raises(ConfigError, match="invalid partition specified: nowhere"):
        slurm.submit(made, "runs/sweep", slurm.Options(("--partition=nowhere",)))
    assert not pathlib.Path("runs/sweep/slurm.json").exists()
    pathlib.Path("runs/sweep/slurm.json").write_text("\0")
    with pytest.raises(RunError, match=r"slurm\.json is damaged"):
        slurm.submit(made, "runs/sweep", slurm.Options())
