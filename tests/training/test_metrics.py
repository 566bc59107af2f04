import http.server
import json
import sys
import threading

import jax
import numpy as np
import pytest
import tiny

from mimic_video.config import ConfigError
from mimic_video.runs.directory import read_metrics
from mimic_video.training.metrics import MetricWriter, device_memory, group_norms, require_wandb, wandb_package

CONFIG = tiny.experiment()


def write(run, start, steps, loss, config=CONFIG):
    with MetricWriter(run, start, config) as writer:
        for step in steps:
            writer.write(step, {"loss": loss, "rate": 0.5})


def losses(run):
    return {record["step"]: record["loss"] for record in read_metrics(run)}


def test_records(tmp_path):
    run = tmp_path / "runs" / "one"
    assert read_metrics(run) == []
    write(run, 0, [10, 20], 1.5)
    assert read_metrics(run) == [{"step": 10, "loss": 1.5, "rate": 0.5}, {"step": 20, "loss": 1.5, "rate": 0.5}]
    assert any((run / "tensorboard").iterdir())


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path):
    with MetricWriter(tmp_path, 0, CONFIG) as writer:
        writer.write(10, {"loss": 1.0})
        assert losses(tmp_path) == {10: 1.0}


def test_steps_that_a_resumed_run_repeats_are_dropped(tmp_path):
    write(tmp_path, 0, [10, 20, 30, 40], 1.0)
    write(tmp_path, 20, [], 2.0)
    assert losses(tmp_path) == {10: 1.0, 20: 1.0}
    write(tmp_path, 20, [30, 40, 50], 2.0)
    assert losses(tmp_path) == {10: 1.0, 20: 1.0, 30: 2.0, 40: 2.0, 50: 2.0}
    write(tmp_path, 0, [10], 3.0)
    assert losses(tmp_path) == {10: 3.0}


def test_a_line_that_a_kill_cut_short_is_ignored(tmp_path):
    write(tmp_path, 0, [10, 20], 1.0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for half in ('{"step": 30, "lo', '{"step": 30, "loss": 1.0}', "{"):  # the second only lacks its newline
        path.write_text(whole + half)
        assert losses(tmp_path) == {10: 1.0, 20: 1.0}
    write(tmp_path, 20, [30], 2.0)
    assert losses(tmp_path) == {10: 1.0, 20: 1.0, 30: 2.0}
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


@pytest.mark.parametrize(
    "damage", [b"\0" * 512 + b"\n", b"\0\xff\n", b"[1]\n", b"\n", b'{"loss": 1.0}\n', b'{"step": null}\n', b"[" * 10**5 + b"\n"]
)
def test_lines_that_are_no_records_are_left_out_with_a_warning(tmp_path, damage, caplog):
    """As a power cut leaves them, in the midst of what later starts have written."""
    write(tmp_path, 0, [10, 20], 1.0)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second + b"\0" * 99)
    assert losses(tmp_path) == {10: 1.0, 20: 1.0}
    assert "metrics.jsonl: 1 of 3 lines are no records and are left out" in caplog.text
    write(tmp_path, 20, [30], 2.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_pictures_go_to_tensorboard(tmp_path):
    with MetricWriter(tmp_path, 0, CONFIG) as writer:
        writer.write_image(10, "curves", np.zeros((4, 6, 3), np.uint8))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"curves" in events.read_bytes() and b"PNG" in events.read_bytes()


def test_every_parameter_counts_in_the_norm_of_one_group():
    shapes = tiny.shapes(tiny.experiment(decoder={"embodiments": 2}))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    tree = {name: params[name] for name in ("backbone", "decoder")}
    norms = jax.jit(group_norms, static_argnums=1)(tree, "grad_norm")
    groups = ("blocks/self_attn", "blocks/cross_attn", "blocks/mlp", "blocks/modulation", "embeddings", "final")
    assert set(norms) == {f"grad_norm/{network}/{group}" for network in tree for group in groups}
    total = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))
    np.testing.assert_allclose(sum(float(norm) ** 2 for norm in norms.values()), total, rtol=1e-5)
    blocks = params["backbone"]["blocks"]
    modulations = {name: part for name, part in blocks.items() if name.endswith("modulation")}
    assert len(modulations) == 3
    for group, part in (("mlp", blocks["mlp"]), ("self_attn", blocks["self_attn"]), ("modulation", modulations)):
        expected = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(part)))
        np.testing.assert_allclose(norms[f"grad_norm/backbone/blocks/{group}"], expected, rtol=1e-5)


def test_adapters_are_a_group_of_their_own():
    adapters = {"a": np.full((2, 3), 2.0), "b": np.zeros((3, 4))}
    norms = group_norms({"lora": {"blocks": {"self_attn": {"q_proj": {"kernel": adapters}}}}}, "param_norm")
    assert {name: float(norm) for name, norm in norms.items()} == {"param_norm/lora/blocks/self_attn": pytest.approx(24**0.5)}


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert device_memory() == {}  # CPU
    monkeypatch.setattr(
        jax, "local_devices", lambda: [Device({"bytes_in_use": n * 10**9, "peak_bytes_in_use": 7 * 10**9}) for n in (2, 3)]
    )
    assert device_memory() == {"hbm_gb": 3.0, "hbm_gb_peak": 7.0}


def test_weights_and_biases_has_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"'train\.wandb_project' is set, .* pip install 'mimic-video-jax\[wandb\]'"):
        wandb_package()


def test_a_run_goes_on_whatever_happens_to_weights_and_biases(tmp_path, caplog):
    class Gone:
        step = 0

        def log(self, *arguments, **options):
            raise BrokenPipeError("its process has ended")

        finish = log

    for steps in ([10, 20], []):  # without steps, its last words fail
        with MetricWriter(tmp_path, 0, CONFIG) as writer:
            writer._wandb = Gone()
            for step in steps:
                writer.write(step, {"loss": 1.0})
        assert list(losses(tmp_path)) == steps
        assert caplog.text.count("Weights & Biases gets no more metrics") == 1 and "its process has ended" in caplog.text
        caplog.clear()


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The package as if just imported, of a user without a key and without a terminal. Returns what sets its server."""
    package = wandb_package()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "stdin", None)

    def server(url):
        package.teardown()
        monkeypatch.setenv("WANDB_BASE_URL", url)

    yield server
    package.teardown()


@pytest.mark.reference
def test_weights_and_biases_without_a_key_or_a_server(wandb, monkeypatch, tmp_path, caplog):
    class Nothing(http.server.BaseHTTPRequestHandler):
        """A server that knows no key."""

        def do_GET(self):
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    config = tiny.experiment(train={"wandb_project": "tests"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        wandb(f"http://127.0.0.1:{server.server_port}")
        message = "'train.wandb_project' is 'tests', but that cannot be used: .*; expected a key .* or WANDB_MODE=offline"
        with pytest.raises(ConfigError, match=message) as error:
            require_wandb("tests")
        assert "\n" not in str(error.value)
        server.shutdown()
        thread.join()
    require_wandb("tests")  # nobody answers any more, and nothing is asked for
    with MetricWriter(tmp_path, 0, config) as writer:
        writer.write(10, {"loss": 1.0})
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert "cannot be reached: " in caplog.text and f"`wandb sync {kept.parent}` sends them" in caplog.text
    assert losses(tmp_path) == {10: 1.0}


@pytest.mark.reference
def test_settings_of_weights_and_biases_that_are_wrong(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlne")
    wandb("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"'train.wandb_project' is 'tests', but .*offlne"):
        require_wandb("tests")


@pytest.mark.reference
def test_a_project_that_weights_and_biases_does_not_take(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb("http://127.0.0.1:1")
    with pytest.raises(
        ConfigError, match=r"'train.wandb_project' is 'a/b#c', but that cannot be used: .*[Ii]nvalid project name"
    ):
        require_wandb("a/b#c")


@pytest.mark.reference
def test_a_resumed_run_goes_on_in_weights_and_biases(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny.experiment(train={"wandb_project": "tests"})
    write(tmp_path, 0, [10, 20], 1.0, config)
    with MetricWriter(tmp_path, 20, config) as writer:
        writer.write(30, {"validation_loss": 2.0})
        writer.write_image(30, "curves", np.zeros((4, 6, 3), np.uint8))
    wandb_package().teardown()  # its process has written then
    identity = (tmp_path / "wandb_id").read_text()
    records = [path.read_bytes() for path in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb"))]
    assert b"learning_rate" in records[0]  # the configuration
    logged = b"".join(records)
    for name in (b"rate", b"validation_loss", b"curves"):
        assert name in logged
    assert read_metrics(tmp_path)[-1] == {"step": 30, "validation_loss": 2.0}
