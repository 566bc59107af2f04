import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import mimic_video

ROOT = pathlib.Path(__file__).parents[1]


def test_public_names_are_what_they_say():
    found = {name: getattr(mimic_video, name) for name in mimic_video.__all__}
    assert {value.__name__ for name, value in found.items() if name != "__version__"} == found.keys() - {"__version__"}
    with pytest.raises(AttributeError, match=r"no attribute 'Polcy'; its names are ConfigError, .*Policy"):
        mimic_video.Polcy  # noqa: B018


def test_the_package_itself_imports_nothing_large():
    code = "import mimic_video, sys; print(sorted({'jax', 'flax', 'numpy'} & sys.modules.keys()), mimic_video.__version__)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert output.split() == ["[]", mimic_video.__version__]


def test_the_version_is_the_one_installed_and_in_the_changelog():
    assert importlib.metadata.version("mimic-video-jax") == mimic_video.__version__
    assert f"## [{mimic_video.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("package", ["mimic_video", "mimic_video_client", "data_pipelines"])
def test_type_checkers_see_the_types(package):
    assert (ROOT / package / "py.typed").is_file()


def test_every_place_names_the_same_stages_of_tests():
    """The markers, what leaves out their modules, continuous integration here and at GitHub."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    stages = [marker.partition(":")[0] for marker in settings][1:]  # after "slow", which all of them are
    listed = {
        "tests/conftest.py": r"STAGES = \((.*)\)",
        ".ci/run": r"for stage in (.*); do",
        ".github/workflows/tests.yml": r"stage: \[(.*)\]",
    }
    for file, pattern in listed.items():
        (names,) = re.findall(pattern, (ROOT / file).read_text())
        assert re.findall(r"\w+", names) == stages, file
