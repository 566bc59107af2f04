"""What the kernel of the notebooks has of ours: launch/colab/cells.py."""

import json
import shlex
import time

import pytest
from colab import cells


def test_flags_are_quoted_for_the_shell():
    fields = {"train.steps": 2, "lora.targets": ("a b", "c'd"), "data.root": "", "x": ()}
    expected = ["--config.train.steps=2", """--config.lora.targets=('a b', "c'd")""", "--config.data.root=", "--config.x=()"]
    assert shlex.split(cells.flags(fields)) == expected


@pytest.mark.parametrize(
    ("chip", "expected"),
    [("CPU", "data,sim"), ("TPU", "tpu,data,sim"), ("Tesla T4", "cuda,data,sim"), ("NVIDIA L4", "cuda,data,sim")],
)
def test_extras_of_a_chip(chip, expected):
    assert cells.extras(chip, "data", "", "sim") == expected


@pytest.mark.processes  # IPython is of the extra `notebook`
def test_pictures_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.gif"):
        cells.pictures(f"{tmp_path}/none.gif")


@pytest.mark.parametrize(("fps", "hz"), [(30, 20.0), (10, 10.0)])
def test_a_recorded_robot(tmp_path, fps, hz):
    (tmp_path / "meta").mkdir()
    features = {"action": {"shape": [7]}, "observation.state": {"shape": [14]}}
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"fps": fps, "features": features}))
    fields = cells.recorded(tmp_path, ["primary=a", "wrist=b"])
    assert (fields["data.control_hz"], fields["data.video_hz"], fields["data.cameras"]) == (hz, hz, ("primary", "wrist"))
    assert (fields["decoder.action_dim"], fields["decoder.proprio_dim"], fields["evaluation.tasks"]) == (7, 14, ())
    assert cells.recorded(tmp_path)["data.cameras"] == ("primary",)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


RUN = {
    "video/config.json": "{}",
    "video/metrics.jsonl": "1\n",
    "video/frozen/x": "f",
    "video/checkpoints/2/params": "a",
    "data/videos/1.0.0/features.json": "d",
}
OWN = {  # of this machine alone
    "video/lock": "me",
    "video/checkpoints/4.orbax-checkpoint-tmp/params": "half",
    "data/demonstrations/incomplete.12_1.0.0.partial/shard": "half",
    "source/episode.mp4": "large",
    "weights/checkpoints/0/params": "large",
}


def test_what_is_whole_is_kept_and_comes_back(tmp_path):
    work, keep, other = (tmp_path / name for name in ("work", "keep", "other"))
    write(work, RUN | OWN)
    cells.Keeper(str(work), str(keep), seconds=3600).stop()
    assert tree(keep) == RUN

    (work / "video/checkpoints/4.orbax-checkpoint-tmp").rename(work / "video/checkpoints/4")
    (work / "video/checkpoints/2/params").unlink()
    (work / "video/checkpoints/2").rmdir()
    write(work, {"video/metrics.jsonl": "1\n2\n"})
    cells.Keeper(str(work), str(keep), seconds=3600).stop()
    changed = {name: text for name, text in RUN.items() if "checkpoints" not in name}
    changed |= {"video/checkpoints/4/params": "half", "video/metrics.jsonl": "1\n2\n"}
    assert tree(keep) == changed

    write(other, {"video/config.json": "newer"})
    write(keep, {"video/checkpoints/partial.6/params": "cut off"})
    cells.Keeper(str(other), str(keep), seconds=3600)._end.set()
    assert tree(other) == changed | {"video/config.json": "newer"}


def test_a_thread_keeps_what_comes_and_a_second_keeper_ends_it(tmp_path, capsys):
    work, keep = tmp_path / "work", tmp_path / "keep"
    write(work, {"a": "1"})
    first = cells.Keeper(str(work), str(keep), seconds=0.02)
    write(work, {"b": "2"})
    deadline = time.monotonic() + 30
    while not (keep / "b").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = cells.Keeper(str(work), "", seconds=0.02)
    assert first._end.is_set()
    write(work, {"c": "3"})
    second.stop()
    assert "c" not in tree(keep) and capsys.readouterr().out.startswith(f"0 files and folders of {keep} fetched")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    work, keep = tmp_path / "work", tmp_path / "file"
    write(work, {"a": "1"})
    keep.write_text("no folder")
    keeper = cells.Keeper(str(work), str(keep), seconds=0.02)
    deadline = time.monotonic() + 30
    while "warning" not in (said := capsys.readouterr().out):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert f"warning: {work} could not be kept in {keep}, and will be tried again" in said
    keeper._end.set()


@pytest.mark.parametrize("keep", ["", "gs://bucket/folder"])
def test_a_bucket_has_the_runs_themselves(tmp_path, keep):
    write(tmp_path / "work", {"a": "1"})
    cells.Keeper(str(tmp_path / "work"), keep).stop()
    assert tree(tmp_path) == {"work/a": "1"}


def test_chip_without_an_accelerator(monkeypatch, tmp_path):
    """nvidia-smi decides for a GPU, whatever devices there are; it may be there without one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cells.glob, "glob", lambda pattern: [])
    assert cells.chip() == "CPU"
    monkeypatch.setattr(cells.glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
    assert cells.chip() == "TPU"
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho Tesla T4\necho Tesla T4\n")
    command.chmod(0o755)
    assert cells.chip() == "Tesla T4"
    command.write_text("#!/bin/sh\nexit 9\n")
    assert cells.chip() == "TPU"
