"""Two robots, one of them with two datasets, in one model: collected, converted, trained from either format and evaluated."""

import json
import shutil

import chex
import pytest
import tiny

from mimic_video.runs import checkpoints, directory

pytestmark = pytest.mark.simulator

SIZE = (32, 32)
RATES = {"image_size": SIZE, "video_hz": 20.0, "control_hz": 20.0, "action_delay": 0.0}


def experiment(stage, layout, **changes):
    evaluation = {"tasks": ("drawer-close-v3",), "episodes_per_task": 2, "max_steps": 6, "layout": layout}
    decoder = {"action_dim": 10, "proprio_dim": 10, "embodiments": 2}
    values = {"data": RATES, "decoder": decoder, "evaluation": evaluation, "train": {"steps": 3, "batch_size": 8}} | changes
    return tiny.experiment(stage=stage, **values)


def test_a_mixture_of_two_action_layouts(launch, one_device, config_file, tmp_path):
    folders = {}
    for layout in ("native", "delta"):
        folder = tmp_path / "data" / layout
        counts = ["--videos=1", "--demonstrations=2", "--validation=1"]
        launch("collect", f"--config={config_file(experiment('action', layout))}", f"--out={folder}", *counts)
        (folder / "demonstrations").rename(folder / layout)  # a dataset goes by the name of its directory
        folders[layout] = folder / layout / "1.0.0"
    folders["more"] = shutil.copytree(folders["delta"], tmp_path / "data" / "more" / "1.0.0")  # of the same robot as "delta"
    robots = (("delta", "arm"), ("more", "arm"))
    records = tmp_path / "array_record"
    copies = {}
    for layout, folder in folders.items():
        launch("convert_dataset", f"--source={folder}", f"--out={records / layout}", "--format=array_record", "--workers=1")
        (converted,) = (records / layout).glob("*/1.0.0")
        copies[layout] = converted.rename(records / layout / "1.0.0")
        assert list(copies[layout].glob("*.array_record-*")) and list(folder.glob("*.tfrecord-*"))

    def train(name, sources):
        """Both stages from one mixture; returns the run of stage 2, its experiment for each dataset, and its data."""
        mixed = f"{sources['native']}*1,{sources['delta']}*2,{sources['more']}*1"
        data = RATES | {"video_dataset": mixed, "action_dataset": mixed, "robots": robots, "workers": 1}
        video, action = tmp_path / f"{name}_video", tmp_path / f"{name}_action"
        launch("train", f"--config={config_file(experiment('video', 'native', data=data))}", f"--workdir={video}")
        layouts = {"native": "native", "delta": "delta", "more": "delta"}
        files = {
            dataset: config_file(experiment("action", layout, data=data, backbone_run=str(video)))
            for dataset, layout in layouts.items()
        }
        launch("train", f"--config={files['native']}", f"--workdir={action}")
        return action, files, data

    action, files, data = train("tfrecord", folders)
    other, _, _ = train("array_record", copies)
    (params, step), (others, _) = (checkpoints.load_params(run, "float32") for run in (action, other))
    assert step == 3
    chex.assert_trees_all_equal(params, others)  # so what follows holds for both
    embodiments = directory.load_embodiments(action)
    assert [(e.name, e.action_dim, e.proprio_dim) for e in embodiments.values()] == [("native", 4, 4), ("arm", 10, 10)]
    width = {"native": 4, "delta": 10, "more": 10}
    for dataset, file in files.items():
        output = launch("evaluate", f"--config={file}", f"--workdir={action}", f"--dataset={dataset}", "--recorded=0")
        assert "drawer-close-v3: " in output
        results = json.loads((action / "evaluation.json").read_text())
        assert len(results["episodes"]) == 2 and len(results["open_loop"]["example"]["planned"][0]) == width[dataset]
    message = launch("evaluate", f"--config={files['native']}", f"--workdir={action}")
    assert message.startswith("error: ") and "'native', 'delta', 'more'" in message
    three = {"action_dim": 10, "proprio_dim": 10, "embodiments": 3}
    narrow = config_file(experiment("action", "native", data=data, decoder=three))
    assert "'decoder.embodiments' is 3; expected 2" in launch("train", f"--config={narrow}", f"--workdir={tmp_path / 'other'}")
