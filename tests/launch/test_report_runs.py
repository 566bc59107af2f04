"""What --policy_run says."""

import pathlib
import runpy

import pytest
from absl import flags

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture
def parse_policies(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    before = set(flags.FLAGS)
    yield runpy.run_path(str(LAUNCH / "report.py"))["parse_policies"]
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_runs_of_a_policy(parse_policies, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    one, other = tmp_path / "one,two", tmp_path / "three"
    one.mkdir()
    for text, runs in ((f"{one}", [one]), (f'"{one}",{other}', [one, other]), ("~/three", [other]), ("~/one,two", [one])):
        assert parse_policies([f"label={text}"]) == {"label": runs}
    for wrong in ("label", "label=", "=run", "label=,"):
        with pytest.raises(ValueError, match="is not of the form LABEL=DIR"):
            parse_policies([wrong])
