"""The notebooks of launch/colab: what is committed, the experiments that they make, and both of them whole, as at Colab."""

import importlib.util
import itertools
import json
import re
import shlex
import sys

import devices
import ml_collections
import notebooks
import pytest
from colab import cells as kernel
from notebooks import NOTEBOOKS, ROOT

from mimic_video.config import experiment_from, field_paths
from mimic_video.errors import ConfigError
from mimic_video.runs.directory import require_same_model
from mimic_video.runs.storage import run_path

FINETUNE, EXPLORE = (ROOT / "launch" / "colab" / f"{name}.ipynb" for name in ("finetune", "explore"))
SMALL = {  # the least that does something in every cell
    "train.batch_size": 2,
    "train.validation_batches": 1,
    "train.action_draws": 1,
    "tokenizer.fit_windows": 4,
    "backbone.num_blocks": 2,
    "backbone.hidden_block": 1,
    "decoder.num_blocks": 1,
    "policy.video_steps": 2,
    "policy.action_steps": 2,
    "evaluation.tasks": ("drawer-close-v3",),
    "evaluation.episodes_per_task": 1,
    "evaluation.max_steps": 3,
    "evaluation.workers": 1,
}
both = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# What is committed.


def test_both_are_there():
    assert set(NOTEBOOKS) == {FINETUNE, EXPLORE}


@both
def test_nothing_that_was_run_is_committed(path):
    for cell in notebooks.cells(path):
        assert cell.stored["metadata"].keys() <= {"tags"}, cell.source
        if cell.kind == "code":
            assert cell.stored["outputs"] == [] and cell.stored["execution_count"] is None, cell.source
    identifiers = [cell.stored["id"] for cell in notebooks.cells(path)]
    assert len(set(identifiers)) == len(identifiers)


@both
def test_one_cell_has_the_parameters_and_nothing_else(path):
    (cell,) = (cell for cell in notebooks.cells(path) if "parameters" in cell.tags)
    lines = cell.source.splitlines()
    assert cell.kind == "code" and all(re.match(r"\w+ = \S", line) for line in lines)
    assert len(lines) == len(notebooks.parameters(path))
    assert notebooks.parameters(path)["work"] == "runs/colab"  # where the other one looks


@both
def test_every_cell_of_code_compiles_and_follows_a_sentence(path):
    found = notebooks.cells(path)
    for before, cell in itertools.pairwise(found):
        if cell.kind == "code":
            compile(notebooks.python(cell.source), path.name, "exec")
            assert before.kind == "markdown", cell.source


def test_cells_are_read_without_what_ipython_adds():
    source = 'if a:\n    !$python x.py --b \\\n        --c="\nelse:\n    %cd -q x\nb = 1  # !'
    assert notebooks.python(source) == "if a:\n    pass\n\nelse:\n    pass\nb = 1  # !"
    with pytest.raises(SyntaxError):
        compile(notebooks.python("if a:\n!x"), "", "exec")


def test_both_begin_in_the_same_way():
    first, second = (next(cell.source for cell in notebooks.cells(path) if "setup" in cell.tags) for path in NOTEBOOKS)
    assert first == second and "git clone" in first
    assert len({notebooks.parameters(path)["repository"] for path in NOTEBOOKS}) == 1


@both
def test_the_badge_opens_the_notebook(path):
    repository = notebooks.parameters(path)["repository"].removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{repository}/blob/main/launch/colab/{path.name}"
    assert notebooks.text(path).count(link) == 1


# Experiments.


def experiments(tmp_path, **changes):
    """What the cell tagged `settings` makes of parameters: its names, and the experiments of both stages."""
    (tmp_path / "lerobot" / "meta").mkdir(parents=True, exist_ok=True)
    features = {"action": {"shape": [6]}, "observation.state": {"shape": [7]}}
    (tmp_path / "lerobot" / "meta" / "info.json").write_text(json.dumps({"fps": 30, "features": features}))
    names = notebooks.parameters(FINETUNE) | changes | {"cells": kernel, "chip": "TPU", "recordings": tmp_path / "lerobot"}
    exec(next(cell.source for cell in notebooks.cells(FINETUNE) if "settings" in cell.tags), names)
    return names, {stage: experiment(names[stage], names["fields"]) for stage in ("video", "action")}


def experiment(name, fields):
    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location("experiment_of_a_notebook", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    assert fields.keys() <= set(field_paths(type(experiment_from(config.to_dict()))))
    config.update_from_flattened_dict(fields)
    return experiment_from(ml_collections.ConfigDict(config).to_dict())


@pytest.mark.parametrize("source", ["", "me/recordings"])
@pytest.mark.parametrize(("model", "weights"), [("small", ""), ("small", "runs/other"), ("2b", "cosmos"), ("2b", "bridge")])
def test_experiments_of_both_stages_fit_each_other(tmp_path, model, weights, source):
    chosen = {"model": model, "weights": weights, "source": source, "cameras": ["primary=a", "wrist=b"] if source else []}
    names, stages = experiments(tmp_path, **chosen)
    require_same_model(stages["video"], stages["action"], run_path("runs/video"), "window", "tokenizer", "backbone")
    action = stages["action"]
    if source:
        assert (action.decoder.action_dim, action.decoder.proprio_dim, action.data.control_hz) == (6, 7, 20.0)
        assert action.data.cameras == ("primary", "wrist") and not action.evaluation.tasks
        assert action.data.action_dataset == "runs/colab/data/recorded/1.0.0" == action.data.video_dataset
    else:
        assert (action.decoder.action_dim, action.data.control_hz, len(action.evaluation.tasks)) == (4, 20.0, 2)
    adapted = experiment(names["video"], names["fields"] | kernel.ADAPTERS)
    assert adapted.lora.rank == 16 and adapted.stage == "video"
    if model == "2b" and not source:
        window = {name: names["fields"][name] for name in kernel.WINDOW}
        converted = experiment("configs/published.py:cosmos", window)
        require_same_model(converted, adapted, run_path("runs/weights"), "window", "tokenizer", "backbone")


def test_settings_are_the_last_word_and_flags_say_the_same(tmp_path, launch):
    names, stages = experiments(tmp_path, steps=3, settings={"train.learning_rate": 0.5, "lora.targets": ("q_proj", "k proj")})
    assert stages["video"].train.learning_rate == 0.5 and stages["video"].train.steps == 3
    shown = launch("train", f"--config={ROOT}/{names['action']}", *shlex.split(names["flags"]), "--show_config")
    values = dict(re.findall(r"^(\S+) +(\(.*?\)|\S+)", shown, re.M))
    assert values["train.learning_rate"] == "0.5" and values["lora.targets"] == "('q_proj', 'k proj')"
    assert values["evaluation.tasks"] == "('drawer-open-v3', 'drawer-close-v3')" and values["data.raw_action_dims"] == "()"


@pytest.mark.parametrize(
    ("model", "weights", "chip", "message"),
    [
        ("3b", "", "TPU", "model is '3b'; expected one of 'small', '2b'"),
        ("2b", "", "TPU", "weights is '', with model '2b'; expected one of 'cosmos', 'bridge', or a run directory"),
        ("small", "cosmos", "TPU", "weights is 'cosmos', of model '2b'; expected '' or a run directory"),
        ("2b", "cosmos", "Tesla T4", "model is '2b' on Tesla T4; expected a TPU v5e, L4 or A100"),
        ("2b", "cosmos", "CPU", "model is '2b' on CPU; expected"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(model, weights, chip, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        kernel.check(model, weights, chip)


def test_fields_of_the_notebook_are_checked():
    with pytest.raises((ConfigError, AttributeError, KeyError, AssertionError)):
        experiment("configs/quickstart.py:video", {"train.lerning_rate": 1.0})


# Whole.


@pytest.fixture
def as_at_colab(monkeypatch, tmp_path):
    """Parameters of commands of one device that have no backend of Jupyter for matplotlib; nothing is left in the user's home."""
    monkeypatch.setenv("XLA_FLAGS", devices.of_each(1)["XLA_FLAGS"])
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return {"work": str(tmp_path / "work"), "python": f"env MPLBACKEND=module://not.installed {sys.executable}"}


@pytest.mark.processes
def test_both_notebooks_run_whole(as_at_colab, tmp_path):
    """From nothing to a policy in the simulator, which the other notebook then looks at."""
    work, kept = tmp_path / "work", tmp_path / "kept"
    ran = notebooks.execute(FINETUNE, tmp_path, **as_at_colab, keep=str(kept), steps=2, episodes=1, settings=SMALL)
    shown = [kind for cell in ran for kind in notebooks.images(cell)]
    assert shown.count("image/gif") == 3 and shown.count("image/png") == 6
    assert "drawer-close-v3: " in "".join(map(notebooks.printed, ran))
    assert json.loads((work / "action" / "evaluation.json").read_text())["open_loop"]["rmse"] > 0
    assert (work / "policy.zip").stat().st_size > 1e5
    for part in ("policy/manifest.json", "action/checkpoints/2/_CHECKPOINT_METADATA", "data/videos/1.0.0/features.json"):
        assert (kept / part).read_bytes() == (work / part).read_bytes()

    ran = notebooks.execute(EXPLORE, tmp_path, **as_at_colab, windows=2, draws=3)
    shown = [kind for cell in ran for kind in notebooks.images(cell)]
    assert shown.count("image/gif") == 2 and shown.count("image/png") == 3
    assert "validation_action_mse/generated_video/tau_" in notebooks.printed(ran[-1])


@pytest.mark.processes
def test_recordings_of_lerobot_become_a_dataset(as_at_colab, tmp_path):
    from foreign_formats import WRIST, write_lerobot

    source = write_lerobot(tmp_path / "mine", "v3.0", (20,) * 10)
    cameras = ["primary=observation.images.top", f"wrist={WRIST}"]
    ran = notebooks.execute(
        FINETUNE, tmp_path, until="!$python launch/inspect_data.py", **as_at_colab, source=str(source), cameras=cameras
    )
    assert "9 episodes of 180 steps in train, 1 episodes of 20 steps in val" in notebooks.printed(ran[-2])
    assert len(notebooks.images(ran[-1])) == 2 and "steps/observation/image_wrist" in notebooks.printed(ran[-1])


@pytest.mark.processes
def test_a_command_that_fails_ends_its_cell(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    try:
        kernel.stop_at_errors(shell)
        kernel.stop_at_errors(shell)  # the cell may be run again
        file = tmp_path / "after.txt"
        failed = shell.run_cell(f"code = 75\n!exit $code\n!touch {file}")
        assert "the command ended with code 75" in str(failed.error_in_exec) and not file.exists()
        shell.run_cell(f"!touch {file}").raise_error()
        assert file.exists()
    finally:
        shell.history_manager.end_session()
