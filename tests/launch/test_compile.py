import importlib.util
import json

import pytest
import tiny

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
ARGUMENTS = ("--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.sequence=2")


@pytest.mark.slow
def test_a_step_that_fits(launch, config_file, tmp_path):
    config, out = config_file(tiny.experiment(stage="action")), tmp_path / "report.json"
    printed = launch("compile", f"--config={config}", *ARGUMENTS, f"--out={out}")
    report = json.loads(out.read_text())
    assert printed.startswith("fits 4 chips of v5e:2x2: ") and "compiled in" in printed
    assert report["fits"] and report["chips"] == 4 and report["mesh"] == {"data": 1, "fsdp": 2, "sequence": 2}
    hbm = report["hbm"]
    parts = hbm["arguments"] + hbm["outputs"] - hbm["aliased"] + hbm["temporaries"] + hbm["code"] + hbm["unread"]
    assert hbm["peak"] == parts < hbm["limit"] and hbm["free_share"] > 0.99
    bound = report["step_bound_seconds"]
    assert bound["step"] == max(bound[name] for name in ("compute", "hbm", "ici", "dcn")) == bound[bound["binding"]]
    assert report["program_flops_per_chip"] > report["model_flops_per_chip"] > 0 and report["loops_of_unknown_length"] == 0


@pytest.mark.slow
def test_a_step_that_does_not_fit(launch, config_file, tmp_path):
    """19,200 tokens, whose logits the plain attention of narrow heads keeps."""
    data = {"image_size": (480, 640), "future_frames": 56, "latents": "x"}
    config = tiny.experiment(stage="video", data=data, backbone_run="x", train={"batch_size": 16})
    out = tmp_path / "report.json"
    printed = launch("compile", f"--config={config_file(config)}", *ARGUMENTS, f"--out={out}")
    report = json.loads(out.read_text())
    assert "does not fit 4 chips of v5e:2x2: needs" in printed
    assert not report["fits"] and report["hbm"]["required"] > report["hbm"]["limit"] == 15.75 * 2**30


def test_mistakes_are_told_apart_from_what_does_not_fit(launch, config_file):
    config = config_file(tiny.experiment())
    assert "topology 'v5e:3x3' is not one" in launch("compile", f"--config={config}", "--topology=v5e:3x3")
    wrong = launch("compile", f"--config={config}", "--topology=v5e:2x2", "--config.mesh.data=3")
    assert "error: config field 'mesh' is" in wrong and "the 4 devices" in wrong
