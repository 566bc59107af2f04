"""What the launcher of Cloud TPU decides and refuses, without a cloud; tests/launch/test_sweep_tpu.py runs it."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import typing

import documented
import fake_tpu_api
import pytest
from sweeps import hosts, points, tpu

from configs.pretrain import TOPOLOGIES
from mimic_video.config import ConfigError, ExperimentConfig, Path, describe
from mimic_video.runs.status import Status
from mimic_video.training.preemption import EXIT_CODE

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = "docs/pods.md"
GOLDEN = ROOT / "tests" / "golden" / "tpu_dry_run.txt"
WORKDIR = "gs://bucket/pretrain"
FIELDS = {
    "backbone_run": "gs://bucket/cosmos",
    "data.root": "gs://data/oxe",
    "data.latents": "gs://data/latents",
    "text.cache": "gs://bucket/text",
}


def jobs(workdir=WORKDIR, config="configs/pretrain.py:video_v5e", **changes):
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    arguments = [f"--config={config}", *(f"--config.{name}={value}" for name, value in fields.items())]
    return points.jobs(points.expand(arguments, None)[0], workdir, False)


def test_a_dry_run_prints_commands_and_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)
    options = tpu.Options("v5litepod-256", slices=2)
    text = tpu.dry_run(jobs(mesh__data=2, train__batch_size=512), WORKDIR + "/", options)
    assert text == GOLDEN.read_text(), f"to accept it: {GOLDEN} is to be what the dry run prints"
    script = text[text.index("#!/bin/bash") :]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("v5litepod-256", ("v5e:16x16", 256, "v2-alpha-tpuv5-lite")),
        ("v5p-256", ("v5p:4x4x8", 128, "v2-alpha-tpuv5")),
        ("v6e-256", ("v6e:16x16", 256, "v2-alpha-tpuv6e")),
        ("v5litepod-1", ("v5e:1x1", 1, "v2-alpha-tpuv5-lite")),
    ],
)
def test_accelerator_types(kind, expected):
    assert tpu.TYPES[kind] == expected


def test_the_document_has_the_accelerator_type_of_each_preset():
    table = re.findall(
        r"^\| `configs/pretrain.py:(\w+)` \| (\S+) \| `(\S+)` \| `(\S+)` \| (\d+) \|", (ROOT / DOCUMENT).read_text(), re.M
    )
    assert len(table) == 5
    for preset, topology, kind, runtime, chips in table:
        assert (TOPOLOGIES[preset], *tpu.TYPES[kind]) == (topology, topology, int(chips), runtime)


@pytest.mark.tpu_compiler
def test_what_the_document_compiles_for_is_a_topology_of_as_many_chips(launch, monkeypatch):
    """With a mesh that does not fit, which is found before anything is compiled: that takes minutes."""
    monkeypatch.chdir(ROOT)
    (command,) = documented.commands(DOCUMENT, "run by tests/launch/test_sweep_tpu_plan.py")
    script, *arguments = shlex.split(command)[1:]
    assert "must multiply to the 256 devices" in launch(pathlib.Path(script).stem, *arguments, "--config.mesh.fsdp=7")


def test_what_the_document_trains_passes_all_checks(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [command for command in documented.commands(DOCUMENT, documented.CLOUD) if "--on=tpu" in command]
    assert len(commands) == 5
    for command in commands:
        script, *arguments = shlex.split(command.replace("$BUCKET", "gs://bucket"))[1:]
        assert script == "launch/sweep.py"
        values = dict(argument[2:].partition("=")[::2] for argument in arguments)
        experiment = [argument for argument in arguments if argument.startswith("--config")]
        options = tpu.Options(values["accelerator_type"], int(values.get("slices", 1)))
        made = points.jobs(points.expand(experiment, None)[0], values["workdir"], False)
        assert f"--accelerator-type={options.accelerator_type}" in tpu.dry_run(made, values["workdir"], options)


@pytest.mark.processes
def test_gcloud_knows_the_commands_of_the_document(tmp_path):
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed here")
    commands = [re.sub(r"^\w+=\$\((.*)\)$", r"\1", command) for command in documented.commands(DOCUMENT, documented.CLOUD)]
    commands = [command.partition(" | ")[0] for command in commands if command.startswith("gcloud ")]
    assert len(commands) > 10
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": command} for command in commands]))
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"]
    environment = os.environ | fake_tpu_api.environment(tmp_path / "gcloud", 9)
    printed = subprocess.run(lint, env=environment, capture_output=True, text=True, check=True).stdout
    results = {result["command_string"]: result["error_message"] for result in json.loads(printed) if not result["success"]}
    assert not results and len(json.loads(printed)) == len(set(commands))


def test_every_way_to_ask_for_a_machine_is_one_that_gcloud_knows():
    cloud = tpu.QueuedResources("p", "z")
    for provisioning in typing.get_args(tpu.Provisioning):
        arguments = cloud.creation("a", tpu.Options("v6e-8", provisioning=provisioning), "f")
        assert "--runtime-version=v2-alpha-tpuv6e" in arguments
        assert {"--spot", "--reserved"} & {*arguments} == ({f"--{provisioning}"} - {"--on_demand"})


def test_every_path_of_a_configuration_is_decided_on():
    paths = {field.path for field in describe(ExperimentConfig) if _is_path(field.path)}
    assert paths == {*hosts.RUNS, *hosts.FOLDERS}


def _is_path(path):
    hint = ExperimentConfig
    for name in path.split("."):
        hint = typing.get_type_hints(hint, include_extras=True)[name]
    return hint == Path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workdir": "/runs/x"}, "--workdir is '/runs/x'; expected gs://BUCKET/FOLDER"),
        ({"workdir": "gs://bucket"}, "--workdir is 'gs://bucket'; expected gs://BUCKET/FOLDER"),
        ({"data__root": "/data"}, "config field 'data.root' is '/data'; expected gs://BUCKET/FOLDER"),
        ({"data__root": ""}, "config field 'data.root' is empty; expected gs://BUCKET/FOLDER with the dataset"),
        ({"data__latents": "runs/latents"}, "config field 'data.latents' is 'runs/latents'; expected gs://"),
        ({"text__cache": "runs/text"}, "config field 'text.cache' is 'runs/text'; expected gs://"),
        ({"text__cache": ""}, "config field 'text.cache' is empty; expected gs://"),
        ({"backbone_run": "runs/cosmos"}, "config field 'backbone_run' is 'runs/cosmos'; expected gs://"),
        ({"start_run": "runs/a"}, "config field 'start_run' is 'runs/a'; expected gs://"),
        ({"data__video_dataset": "gs://b/c,d/e"}, "config field 'data.video_dataset' has 'd/e'; expected gs://"),
        ({"mesh__fsdp": 64}, "axes must multiply to the 256 devices there are"),
        ({"train__batch_size": 255}, "config field 'train.batch_size' is 255; expected a multiple of data x fsdp, 256"),
        ({"train__wandb_project": "a"}, "config field 'train.wandb_project' is 'a'; expected ''"),
    ],
)
def test_what_hosts_could_not_do_is_refused(monkeypatch, changes, message):
    monkeypatch.chdir(ROOT)
    workdir = changes.get("workdir", WORKDIR)
    with pytest.raises(ConfigError) as error:
        tpu.check(jobs(**{"workdir": workdir} | changes), workdir, tpu.Options("v5litepod-256"))
    assert message in str(error.value)


def test_other_mistakes_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"--accelerator_type is 'v5e-256'; expected one of v5litepod-1, .*v6e-256"):
        tpu.check(jobs(), WORKDIR, tpu.Options("v5e-256"))
    with pytest.raises(ConfigError, match=r"'mesh' is .* must multiply to the 512 devices"):
        tpu.check(jobs(), WORKDIR, tpu.Options("v5litepod-256", slices=2))
    copy = shutil.copy(ROOT / "configs" / "pretrain.py", tmp_path)
    with pytest.raises(ConfigError, match=r"--config is '.*pretrain.py'; expected a file of the clone .* that git knows"):
        tpu.check(jobs(config=copy), WORKDIR, tpu.Options("v5litepod-256"))
    evaluated = points.jobs(points.expand(["--config=configs/quickstart.py:action"], [])[0], WORKDIR, True)
    with pytest.raises(ConfigError, match=r"gs://bucket/pretrain is to be evaluated .* no simulator"):
        tpu.check(evaluated, WORKDIR, tpu.Options("v5litepod-1"))


def test_without_project_or_gcloud_nothing_is_asked_for(monkeypatch, tmp_path):
    fake = tmp_path / "gcloud"
    fake.write_text('#!/bin/bash\necho \'{"core": {"project": "p"}}\'\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ConfigError, match="gcloud knows no zone; expected it from gcloud config set compute/zone or in CLOUDSDK"):
        tpu.QueuedResources.of_environment()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="gcloud is not installed"):
        tpu.QueuedResources.of_environment()


def test_errors_that_pass_are_told_apart():
    passing = ["RESOURCE_EXHAUSTED: Quota limit", "HttpError 503", "Unable to find the server at tpu.googleapis.com", "timed out"]
    lasting = [
        "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
        "unrecognized arguments: --internal-ip",
        "HttpError 400",
    ]
    assert [tpu.CloudError(text).passes for text in passing + lasting] == [True] * 4 + [False] * 3


NOW, BEFORE, AFTER = "2026-01-02T03:04:05.678Z", "2026-01-02T03:00:00Z", "2026-01-02T03:10:00Z"
ACTIVE = tpu.Resource("ACTIVE", NOW)
RUNNING, KILLED = Status("running", step=3, steps=9, starts=1), Status("killed", reason="process 1 has shown no sign of life")


@pytest.mark.parametrize(
    ("resource", "status", "codes", "quiet", "do", "state"),
    [
        (None, Status("waiting"), {}, 0, "create", "waiting"),
        (None, Status("failed", updated=AFTER), {}, 0, "create", "waiting"),  # the same command starts it again
        (None, Status("finished"), {}, 0, "finish", "finished"),
        (ACTIVE, Status("finished"), {}, 0, "wait", "ending"),  # logs are copied
        (ACTIVE, Status("finished"), {"a": 0}, 0, "finish", "finished"),
        (ACTIVE, Status("finished"), {}, tpu.GRACE, "finish", "finished"),
        (tpu.Resource("WAITING_FOR_RESOURCES", NOW), Status("waiting"), {}, 0, "wait", "WAITING_FOR_RESOURCES"),
        (tpu.Resource("DELETING", NOW), Status("failed", updated=AFTER), {}, 0, "wait", "DELETING"),
        (tpu.Resource("SUSPENDED", NOW), KILLED, {}, 0, "delete", "SUSPENDED"),
        (tpu.Resource("FAILED", NOW, "no capacity"), Status("waiting"), {}, 0, "delete", "FAILED"),
        (ACTIVE, RUNNING, {"b": 1}, 0, "wait", "running"),
        (ACTIVE, Status("waiting"), {}, 0, "wait", "starting"),
        (ACTIVE, Status("failed", updated=AFTER, reason="r"), {"a": 1}, 0, "fail", "failed"),
        (ACTIVE, Status("failed", updated=BEFORE, reason="r"), {}, 0, "wait", "starting"),  # of an earlier attempt
        (ACTIVE, Status("waiting"), {"a": 69, "b": 1}, 0, "delete", "lost"),
        (ACTIVE, KILLED, {"a": 69}, 0, "delete", "lost"),
        (ACTIVE, KILLED, {"a": 0}, 0, "wait", "starting"),
        (ACTIVE, KILLED, {}, tpu.PATIENCE + 1, "delete", "lost"),  # a host that died without a word
        (ACTIVE, Status("stopped"), {}, tpu.PATIENCE + 1, "delete", "lost"),
    ],
)
def test_what_is_done_about_a_run(resource, status, codes, quiet, do, state):
    assert tpu.judged(resource, status, codes, quiet)[:2] == (do, state)


def test_a_run_that_does_not_advance_is_given_up(monkeypatch, tmp_path, capsys):
    """Machines of a run are taken away at once; another one advances once."""

    class Cloud:
        resources: typing.ClassVar = {}
        created: typing.ClassVar = []

        def listed(self):
            return dict(self.resources)

        def create(self, name, options, script):
            self.created.append(name)
            self.resources[name] = tpu.Resource("SUSPENDED", NOW)

        def delete(self, name):
            del self.resources[name]

    monkeypatch.chdir(ROOT)
    (job,) = jobs()
    monkeypatch.setattr(tpu, "check", lambda *_: None)
    monkeypatch.setattr(tpu, "_upload", lambda _: "code")
    monkeypatch.setattr(tpu.QueuedResources, "of_environment", Cloud)
    made = [points.dataclasses.replace(job, run=str(tmp_path / name), name=name) for name in ("a", "b")]
    monkeypatch.setattr(tpu, "startup_script", lambda *_: "")
    (tmp_path / "b").mkdir()
    steps = iter([*[0] * 3, *[5] * 30])

    def status(run, *_):
        return Status("stopped", step=next(steps) if run.name == "b" else 0)

    monkeypatch.setattr(tpu, "read_status", status)
    assert tpu.run(made, str(tmp_path), tpu.Options("v5litepod-256", jobs=2), poll=0) == 1
    assert Cloud.created.count("a") == tpu.CREATIONS and Cloud.created.count("b") > tpu.CREATIONS
    assert not Cloud.resources
    stored = json.loads((tmp_path / "a" / "status.json").read_text())["training"]
    assert stored["state"] == "failed" and stored["reason"].startswith("asked for 5 times")
    printed = capsys.readouterr().out
    assert "failed: a: asked for 5 times without getting beyond step 0; SUSPENDED: its machine was taken away" in printed
    assert "failed: b: asked for 5 times without getting beyond step 5" in printed


def test_a_launcher_that_is_asked_to_stop_leaves_runs_alone(monkeypatch, capsys):
    class Cloud:
        def listed(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return {job.name: tpu.Resource("PROVISIONING", NOW)}

    monkeypatch.chdir(ROOT)
    (job,) = jobs()
    monkeypatch.setattr(tpu, "_upload", lambda _: "code")
    monkeypatch.setattr(tpu, "read_status", lambda _: Status("waiting"))
    monkeypatch.setattr(tpu.QueuedResources, "of_environment", Cloud)
    before = signal.getsignal(signal.SIGTERM)
    assert tpu.run([job], WORKDIR, tpu.Options("v5litepod-256")) == EXIT_CODE
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped watching: runs go on" in capsys.readouterr().out


def test_the_code_is_what_git_knows_as_it_is_now(monkeypatch, tmp_path):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for name in ("a.py", "gone.py", "untracked.py", "run.sh"):
        (tmp_path / name).write_text(name)
    (tmp_path / "run.sh").chmod(0o700)
    git("add", "a.py", "gone.py", "run.sh")
    (tmp_path / "gone.py").unlink()
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    before, _ = hosts.archive()
    (tmp_path / "a.py").touch()
    assert hosts.archive()[0] == before  # dates do not count
    (tmp_path / "a.py").write_text("changed")
    name, content = hosts.archive()
    assert name != before
    (tmp_path / "packed").write_bytes(content)
    with tarfile.open(tmp_path / "packed") as tar:
        assert {info.name: info.mode for info in tar} == {"a.py": 0o644, "run.sh": 0o755}
        assert tar.extractfile("a.py").read() == b"changed"


def test_text_models_and_quoted_folders_reach_hosts(monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = {"text__model": "gs://models/t5-11b", "data__video_dataset": '"gs://b/my,data"*2,gs://c/d/1.0.0'}
    (job,) = jobs(**changes)
    tpu.check([job], WORKDIR, tpu.Options("v5litepod-256"))
    script = tpu.startup_script(job, WORKDIR, "code")
    arguments = shlex.split(script[script.index("arguments=(") :].partition("(")[2].partition("\n)")[0])
    assert '--config.data.video_dataset="/gcs/b/my,data"*2,/gcs/c/d/1.0.0' in arguments
    assert "--config.text.model=/gcs/models/t5-11b" in arguments and "--config.backbone_run=gs://bucket/cosmos" in arguments
    assert "\nbuckets='b bucket c data models'\n" in script and "\nextras=tpu,data,gcs,text\n" in script
