import json

import pytest
import tiny

pytestmark = pytest.mark.tpu_compiler

ARGUMENTS = ("--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.sequence=2")


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


def test_a_step_that_does_not_fit(launch, config_file, tmp_path):
    """Gigabytes of what a wide MLP has inside, of samples of 19,200 tokens."""
    data = {"image_size": (480, 640), "future_frames": 56, "latents": "x"}
    config = tiny.experiment(stage="video", data=data, backbone_run="x", train={"batch_size": 16}, backbone={"mlp_ratio": 2000.0})
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


def test_a_policy(launch, config_file, tmp_path):
    out = tmp_path / "report.json"
    printed = launch(
        "compile",
        f"--config={config_file(tiny.experiment())}",
        "--topology=v6e:1x1",
        "--program=policy",
        "--batch_size=2",
        f"--out={out}",
    )
    report = json.loads(out.read_text())
    assert printed.startswith("fits 1 chips of v6e:1x1: ") and "a policy's plan for 2 robots of 6 tokens" in printed
    assert report["fits"] and report["program"] == "policy" and report["batch_size"] == 2 and report["chips"] == 1


def test_what_is_known_of_a_gpu(launch, config_file, tmp_path):
    config, out = config_file(tiny.experiment(precision="bfloat16", mesh={"data": 2})), tmp_path / "report.json"
    printed = launch("compile", f"--config={config}", "--platform=cuda", "--devices=2", f"--out={out}")
    report = json.loads(out.read_text())
    assert printed.startswith("lowers for 2 GPUs of compute capability 9.0\na step of 8 samples of 6 tokens: ")
    assert report["attention"] == {"cudnn": {"forward": 4, "backward": 2}, "by_xla": []} and report["chips"] == 2
    largest = [each["bytes"] for each in report["largest_arrays"]]
    assert largest == sorted(largest, reverse=True) and report["argument_bytes_per_chip"] > 0

    policy = launch("compile", f"--config={config}", "--platform=cuda", "--capability=7.5", "--program=policy", f"--out={out}")
    assert "a policy's plan for 1 robots of 6 tokens" in policy and "attention by XLA: cudnn does not take compute cap" in policy
    assert json.loads(out.read_text())["attention"]["cudnn"] == {"forward": 0, "backward": 0}


def test_what_is_missing_is_named(launch, config_file):
    config = config_file(tiny.experiment())
    assert "--topology is missing" in launch("compile", f"--config={config}")
    wrong = launch("compile", f"--config={config}", "--platform=cuda", "--capability=nine")
    assert "error: --capability=nine is no compute capability; expected one like 9.0" in wrong
    wrong = launch("compile", f"--config={config}", "--platform=cuda", "--topology=v5e:2x2")
    assert "error: --topology is given, which says nothing for --platform=cuda" in wrong
    wrong = launch("compile", f"--config={config}", "--topology=v5e:2x2", "--batch_size=2")
    assert "error: --batch_size is given, which says nothing for --program=step" in wrong
    wrong = launch("compile", f"--config={config}", "--platform=cuda", "--program=policy", "--devices=2")
    assert "error: --devices is given, which says nothing for --program=policy, which is for one chip" in wrong
