"""The order of the quickstart's phases, what is done again and what not, and its results. `.ci/run` runs all of it, short."""

import json
import pathlib

import pytest
import quickstart
from absl import flags
from quickstart import Phase, decoders, phases, run_phases, summarise

for name in [name for name in flags.FLAGS if flags.FLAGS.find_module_defining_flag(name) == quickstart.__name__]:
    delattr(flags.FLAGS, name)  # scripts that other tests run define theirs

WORK = pathlib.Path("/runs/quick, start")


def commands(*, smoke=False, ablation=False):
    return [phase.command for phase in phases(WORK, smoke, ablation)]


@pytest.mark.parametrize("smoke", [False, True])
def test_the_ablation_adds_to_what_is_there(smoke):
    plain, more = commands(smoke=smoke), commands(smoke=smoke, ablation=True)
    assert [command[0] for command in plain] == [
        "launch/collect.py",
        "launch/collect.py",
        "launch/evaluate.py",
        *("launch/train.py", "launch/evaluate.py") * 2,
        "launch/report.py",
    ]
    assert [command for command in plain if command not in more] == [plain[-1]]  # the report has other runs
    assert len(more) == len(plain) + 2 * 3
    trained = [
        command for command in more if command[0] == "launch/train.py" and f"--config.backbone_run={WORK / 'video'}" in command
    ]
    assert [[flag for flag in command if "seed=" in flag] for command in trained] == [["--config.seed=0"], ["--config.seed=1"]]
    assert sum("--config.backbone_run=" in command for command in more if command[0] == "launch/train.py") == 2


@pytest.mark.parametrize("ablation", [False, True])
def test_the_report_is_of_the_decoders_that_were_trained(ablation):
    runs = [str(run) for arm in decoders(WORK, ablation).values() for run in arm]
    assert len(runs) == len({*runs}) == (4 if ablation else 1)
    report = commands(ablation=ablation)[-1]
    assert sum(flag.count(f'"{run}"') for flag in report for run in runs) == len(runs)
    trained = [flag for command in commands(ablation=ablation) for flag in command if flag.startswith("--workdir=")]
    assert {f"--workdir={run}" for run in runs} <= {*trained}


def test_finished_phases_are_not_run_again(tmp_path, capfd):
    def phase(name, code=0):
        return Phase(name, 10, ["-c", f"print('ran {name}'); raise SystemExit({code})"])

    with pytest.raises(SystemExit, match="'two' ended with code 3; the same command continues from here"):
        run_phases([phase("one"), phase("two", 3), phase("three")], tmp_path)
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("ran ")] == ["ran one", "ran two"]
    times = run_phases([phase("one"), phase("two"), phase("three")], tmp_path)
    printed = capfd.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("ran ")] == ["ran two", "ran three"]
    assert printed[0].startswith("[1/3] one: done before, ")
    assert [phase.title for phase, _ in times] == ["one", "two", "three"] and min(seconds for _, seconds in times) > 0

    (tmp_path / "phases.json").write_text("[")
    with pytest.raises(SystemExit, match=r"phases\.json is damaged"):
        run_phases([phase("one")], tmp_path)


def test_a_phase_beside_others_is_ready_before_one_that_needs_it(tmp_path, capfd):
    def phase(name, code, output=None, needs=()):
        return Phase(name, 10, ["-c", code], output and tmp_path / output, needs)

    # The first one waits for the second, the last one needs the first.
    first = "import pathlib, time\nwhile not pathlib.Path('{0}/two').exists(): time.sleep(0.01)\nprint('hidden'); {1}"
    second = phase("second", f"import pathlib; pathlib.Path({str(tmp_path / 'two')!r}).touch()")
    last = phase("last", f"print('last after ' + open({str(tmp_path / 'first.txt')!r}).read())", needs=("first",))
    with pytest.raises(SystemExit, match=r"'first' ended with code 3, as .*first\.txt explains; the same command continues"):
        run_phases([phase("first", first.format(tmp_path, "raise SystemExit(3)"), "first.txt"), second, last], tmp_path)
    assert "\nlast after" not in capfd.readouterr().out
    todo = [phase("first", first.format(tmp_path, ""), "first.txt"), second, last]
    assert [phase.title for phase, _ in run_phases(todo, tmp_path)] == ["first", "second", "last"]
    printed = capfd.readouterr().out
    assert "[2/3] second: done before" in printed and "\nlast after hidden" in printed and "\nhidden" not in printed


def test_seeds_are_pooled(tmp_path):
    for index, run in enumerate([tmp_path / "expert", *(run for arm in decoders(tmp_path, True).values() for run in arm)]):
        run.mkdir()
        success = {"overall": {"successes": 10 + index, "episodes": 20, "rate": (10 + index) / 20}}
        (run / "evaluation.json").write_text(json.dumps({"success": success, "open_loop": {"rmse": index / 10}}))
    times = [(Phase("a", 1, []), 1.5), (Phase("b", 1, []), 2.0), (Phase("c", 1, [], tmp_path / "c.txt"), 4.0)]
    results = summarise(tmp_path, True, times)
    assert results["trained_backbone"]["successes"] == 11 + 12 and results["untrained_backbone"]["successes"] == 13 + 14
    assert results["success_rate"] == 23 / 40 and results["unseen_seeds"] == 20
    assert results["trained_backbone"]["low"] < 23 / 40 < results["trained_backbone"]["high"]
    assert results["seconds"] == 3.5 and results["phases"][2] == {"phase": "c", "seconds": 4.0, "beside": True}
    alone = summarise(tmp_path, False, times)
    assert alone["success_rate"] == 11 / 20 and "untrained_backbone" not in alone
