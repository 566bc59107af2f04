import numpy as np
import pages
import pytest
import tiny

from mimic_video.evaluation.doctor_page import Examination, write_page
from mimic_video.evaluation.findings import ActionMeasurements, Finding, FlowTimeMeasurements, VideoMeasurements

FOUND = [
    Finding("prompt", "fine", "it <matters>"),
    Finding("cameras", "fault", "two are swapped", "exchange them"),
    Finding("latency", "doubt", "the robot waits", "plan faster"),
]


def test_faults_come_first_and_everything_measured_is_drawn(tmp_path):
    random = np.random.default_rng(0)
    episodes, chunk = np.repeat([0, 1, 2], 2), random.standard_normal((6, 4, 2))
    planned = dict.fromkeys(("recorded", "noise", "video"), chunk + 1)
    mask = np.ones((6, 4), bool)
    mask[0, 2:] = False
    errors = random.uniform(0.1, 1, (6, 4))
    errors[1, 3] = np.nan
    examination = Examination(
        "runs/action",
        tiny.experiment(),
        "data",
        FOUND,
        ActionMeasurements(episodes, mask, chunk, planned, chunk * 0, np.arange(4) / 10),
        np.ones((4, 2)),
        FlowTimeMeasurements(episodes, np.array([0.9, 0.1]), 0.9, errors[:, :2].T, errors[:, :2].T),
        VideoMeasurements(episodes, {"recorded": errors}, errors, errors, {}),
    )
    write_page(tmp_path / "new" / "page.html", examination)
    source = (tmp_path / "new" / "page.html").read_text()
    assert pages.require_self_contained(source) == ["png"] * 3
    page = pages.Page(source)
    assert "1 of 3 checks found something wrong." in page.text
    order = [page.text.index(text) for text in ("Two are swapped.", "→ Exchange them.", "The robot waits.", "It <matters>.")]
    assert order == sorted(order)
    assert ["policy", "1.000", "1.000"] in page.rows and ["other video", "1.000", "1.000"] in page.rows


@pytest.mark.parametrize(
    ("found", "text"), [(FOUND[:1], "none of 1 checks found anything wrong"), (FOUND[1:2] * 2, "2 of 2 checks")]
)
def test_findings_alone(tmp_path, found, text):
    write_page(tmp_path / "page.html", Examination("runs/video", tiny.experiment(stage="video"), "data", found))
    source = (tmp_path / "page.html").read_text()
    assert pages.require_self_contained(source) == [] and text in source
    assert ("What stands further down often follows" in source) == (len(found) == 2)
