import importlib.util
import subprocess
import sys

import pytest
from foreign_formats import write_lerobot

from data_pipelines.rlds_package import import_rlds
from data_pipelines.sources.lerobot import LeRobotSource
from data_pipelines.writers import write_rlds


@pytest.mark.reference
def test_it_judges_what_we_write_as_rlds(tmp_path):
    source = LeRobotSource(write_lerobot(tmp_path / "demo", "v2.1", (5, 8)))
    path = write_rlds(
        tmp_path, "demo_rlds", {"train": source}, control_hz=10.0, image_size=(16, 16), description="", file_format="tfrecord"
    )
    script = f"""
from data_pipelines.rlds_package import import_rlds
rlds = import_rlds()
import tensorflow_datasets as tfds
from rlds import rlds_types
episodes = tfds.builder_from_directory({str(path)!r}).as_dataset(split="train")
lengths = [int(rlds.transformations.episode_length(episode[rlds.STEPS])) for episode in episodes]
returned = [float(rlds.transformations.sum_dataset(episode[rlds.STEPS], lambda step: step[rlds.REWARD])) for episode in episodes]
print([rlds_types.is_valid_rlds_dataset(episodes), lengths, returned])
"""
    # In a process of its own: rlds imports TensorFlow, which does not survive being imported after JAX.
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == "[True, [5, 8], [1.0, 1.0]]"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder to import from, with an `rlds` that needs of `reverb` what the real one does at its import."""
    for name in ("rlds", "reverb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    pattern = "def pattern(of: reverb.structured_writer.Config): return reverb.PatternDataset"
    (tmp_path / "rlds.py").write_text(f"import reverb\n{pattern}")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("rlds", "reverb"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(importlib.util.find_spec("reverb") is not None, reason="Reverb is installed")
def test_the_stand_in_is_gone_afterwards(packages):
    rlds = import_rlds()
    assert rlds is import_rlds() and "reverb" not in sys.modules
    with pytest.raises(AttributeError, match="'reverb' has no attribute 'PatternDataset'"):
        rlds.pattern(None)


def test_an_installed_reverb_is_used(packages):
    (packages / "reverb.py").write_text("class structured_writer: Config = int\nPatternDataset = 5")
    assert import_rlds().pattern(None) == 5 and "reverb" in sys.modules


def test_what_to_install(packages):
    (packages / "rlds.py").write_text("import a_module_that_is_nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"pip install rlds tensorflow-cpu .*a_module_that_is_nowhere"):
        import_rlds()
    assert "reverb" not in sys.modules
