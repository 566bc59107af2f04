"""Runs launch scripts in this process, as a command line would."""

import pathlib
import runpy
import sys

import pytest
from absl import flags

from mimic_video.config import to_dict

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture
def launch(monkeypatch, capfd):
    """launch(script, *arguments) → what the script printed if it succeeds, else its error message, which has no traceback."""

    def run(script, *arguments):
        before, path = set(flags.FLAGS), str(LAUNCH / f"{script}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(LAUNCH))
        try:
            with pytest.raises(SystemExit) as exit:
                runpy.run_path(path, run_name="__main__")
        finally:
            for name in set(flags.FLAGS) - before:  # libraries that the script was the first to import keep theirs
                if name.startswith("config") or flags.FLAGS.find_module_defining_flag(name) == path:
                    delattr(flags.FLAGS, name)
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        if exit.value.code in (None, 0):
            return output.out
        return exit.value.code if isinstance(exit.value.code, str) else output.err + output.out

    return run


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """config_file(experiment) → the path of an experiment file whose argument is the stage."""

    def write(experiment):
        path = tmp_path_factory.mktemp("configs") / "tiny_config.py"
        path.write_text(
            f"import ml_collections\n\ndef get_config(stage={experiment.stage!r}):\n"
            f"    return ml_collections.ConfigDict({to_dict(experiment)!r} | {{'stage': stage}})\n"
        )
        return path

    return write
