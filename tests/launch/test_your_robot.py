"""docs/your_robot.md as a user follows it, on recordings that lerobot has written: no file is edited."""

import json
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from documented import commands

from data_pipelines import benchmark
from mimic_video.runs.directory import load_embodiments, read_metrics

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
RECORDINGS = ROOT / "tests" / "lerobot_recordings"
SMALL = [
    f"--config.{field}={value}"
    for field, value in {
        "train.steps": 2,
        "train.warmup_steps": 0,
        "train.batch_size": 4,
        "tokenizer.fit_windows": 8,
        "backbone.width": 16,
        "backbone.num_heads": 2,
        "backbone.num_blocks": 1,
        "backbone.hidden_block": 1,
        "backbone.adaln_lora_dim": 4,
        "decoder.width": 16,
        "decoder.num_heads": 2,
        "decoder.num_blocks": 1,
        "decoder.adaln_lora_dim": 4,
        "policy.video_steps": 2,
        "policy.action_steps": 2,
    }.items()
]


class Guide:
    """The commands of the document, for a recording in a folder of its own, in the order in which they are asked for."""

    def __init__(self, folder, version, name):
        self.name = name
        shutil.copytree(RECORDINGS / version, folder / "data" / self.name)
        replaced = {"/data/my_recording": str(folder / "data" / self.name), "runs/my_recording": f"runs/{self.name}"}
        self._commands = []
        for command in commands("docs/your_robot.md", "run by tests/launch/test_your_robot.py"):
            for old, new in replaced.items():
                command = command.replace(old, new)
            self._commands.append(shlex.split(command))

    def next(self, script):
        """Arguments of the next command, which has to be of that script."""
        command = self._commands.pop(0)
        assert pathlib.PurePath(command[1]).stem == script or command[1:3] == ["-m", f"mimic_video_client.{script}"]
        return command[3:] if command[1] == "-m" else command[2:]

    @property
    def done(self):
        return not self._commands


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_from_a_recording_to_a_robot(launch, one_device, monkeypatch, tmp_path, version):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "_SETTLE", 0.0)  # between readers, for numbers that nobody looks at here
    guide = Guide(tmp_path, version, f"my_recording_{version}")

    printed = launch("new_robot", *guide.next("new_robot"))
    assert "  camera primary: observation.images.top\n  camera wrist: observation.images.wrist\n" in printed
    assert "  proprio: vector (7): joints 6 [as recorded] | gripper 1 [as recorded]\n" in printed
    assert "  * 3 episodes are too few to hold some out" in printed and "    to change: data.train_split" in printed
    assert f"--config=configs/mine.py:action --workdir=runs/{guide.name}/action" in printed

    for stage in ("video", "action"):
        launch("train", *guide.next("train"), *SMALL)
        assert [record["step"] for record in read_metrics(tmp_path / "runs" / guide.name / stage)][-1:] == [2]
    (robot,) = load_embodiments(tmp_path / "runs" / guide.name / "action").values()
    assert (robot.name, robot.datasets, robot.cameras) == ("so101", (guide.name,), ("primary", "wrist"))
    findings = launch("doctor", *guide.next("doctor"))  # two steps teach nothing
    assert (
        "mean action: the squared error of planned actions is " in findings
        and f"wrote runs/{guide.name}/action/doctor.html" in findings
    )
    assert "wrote runs" in launch("export", *guide.next("export"))

    server = [sys.executable, str(ROOT / "launch" / "serve.py"), *guide.next("serve"), "--port=0"]
    process = subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving 'so101' at ws://"), line + process.stderr.read()
        loop = [argument for argument in guide.next("robot_loop") if not argument.startswith("--server=")]
        loop = [sys.executable, "-m", "mimic_video_client.robot_loop", f"--server={line.split()[-1]}", *loop]
        ran = subprocess.run(loop, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("would do [") == 10  # of 7 numbers each, ten a second
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()

    if version == "v30":  # what follows does not depend on it
        return
    launch("train", *guide.next("train"), *SMALL)  # the folder itself in place of its entry
    losses = [[record["loss"] for record in read_metrics(run)] for run in (f"runs/{guide.name}/video", "runs/direct")]
    assert losses[0] == losses[1] and losses[0]

    measured = json.loads(
        launch("benchmark_data", *guide.next("benchmark_data"), "--windows=16", "--memory_windows=40").splitlines()[-1]
    )
    assert measured["ratio_to_pyav"] == measured["loader_frames_per_second"] / measured["pyav_frames_per_second"] > 0
    assert (measured["recorded"], measured["size"]) == ([48, 64], [96, 128])
    assert measured["memory"]["windows"] == 40 and measured["memory"]["first_mb"] > 10
    assert guide.done


def test_an_entry_from_a_file(launch, one_device, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    guide = Guide(tmp_path, "v30", "my_other_recording")
    launch("new_robot", *guide.next("new_robot"))
    text = (tmp_path / "configs" / "mine.py").read_text().replace(f'name="{guide.name}"', 'name="entry_of_a_file"')
    (tmp_path / "entry.py").write_text(text.split("\ndef get_config")[0])
    arguments = [*guide.next("train"), *SMALL, "--config.data.video_dataset=entry_of_a_file"]
    assert "names 'entry_of_a_file': there is no such folder, and no dataset" in launch("train", *arguments)
    launch("train", *arguments, "--robot=entry.py")
    assert (tmp_path / "runs" / guide.name / "video" / "checkpoints" / "2").is_dir()
