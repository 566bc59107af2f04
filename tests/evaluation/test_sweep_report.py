"""Tables and pages about sweeps that are made up, whole and half-finished, in a folder and in a bucket."""

import csv
import io
import itertools
import json
import re
import statistics

import pytest
import scipy.stats
from buckets import emulated_bucket
from etils import epath
from pages import Page, require_self_contained
from rich.console import Console
from sweep_runs import STEPS, evaluate, kill, sweep, train

from mimic_video.evaluation import page, sweep_report
from mimic_video.evaluation.rollouts import wilson_interval
from mimic_video.evaluation.sweep_report import csv_text, html_page, mean_interval, pooled, table, write_results
from mimic_video.evaluation.sweep_results import Entry, load_entries, results, save_entries
from mimic_video.media import matplotlib_figure
from mimic_video.runs.storage import RunError, run_path

RATE, DECAY, ODD = "train.learning_rate", "train.weight_decay", 'loss is <b>nan</b> & "more", in [bold]words[/bold]'


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as url:
        yield run_path(url)


@pytest.fixture(scope="module")
def half_finished(tmp_path_factory):
    """Rates 0.1 and 0.3, three decays, two seeds. The last three points failed, were killed, and wait."""
    workdir = epath.Path(tmp_path_factory.mktemp("sweep"))
    entries = sweep(
        workdir, [{RATE: r, DECAY: d, "seed": s} for r, d, s in itertools.product((0.1, 0.3), (0.0, 0.01, 0.1), (0, 1))]
    )
    for i, entry in enumerate(entries[:9]):
        train(workdir / entry.run, [0.9, 0.5 + i / 30, 0.6 + i / 30, 0.7 + i / 30])
        evaluate(workdir / entry.out, 8 - i // 2)
    train(workdir / entries[9].run, [0.9, 0.4], ValueError(ODD))
    train(workdir / entries[10].run, [0.9, 0.8])
    kill(workdir / entries[10].run)
    save_entries(workdir, [Entry("again", entries[8].values, "again", "again")])  # as another sweep in the same folder would
    return workdir


def read(workdir):
    return results(workdir, load_entries(workdir))


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_both_files_are_written_where_the_sweep_is(place, tmp_path, request):
    workdir = epath.Path(tmp_path) if place == "folder" else request.getfixturevalue("bucket") / "sweep"
    entries = sweep(workdir, [{RATE: 0.1}, {RATE: 0.3}, {RATE: 1.0}])
    for entry, successes in zip(entries[:2], (2, 7), strict=True):
        train(workdir / entry.run, [0.4, 0.2])
        evaluate(workdir / entry.out, successes)
    found = write_results(workdir, None)
    assert [point.entry.name for point in found] == ["learning_rate=0.3", "learning_rate=0.1", "learning_rate=1.0"]
    rows = rows_of((workdir / "sweep.csv").read_text())
    assert [row["successes"] for row in rows] == ["7", "2", ""]
    source = (workdir / "sweep.html").read_text()
    assert require_self_contained(source) == ["png", "png"]  # over the rate, and curves
    assert {path.name for path in workdir.iterdir()} == {"sweep.json", "sweep.csv", "sweep.html", *(e.name for e in entries[:2])}
    assert [point.entry.name for point in write_results(workdir, "validation")][2] == "learning_rate=1.0"


def test_a_row_of_the_csv_has_all_of_a_point_in_full_precision(half_finished):
    points = {point.entry.name: point for point in read(half_finished)}
    rows = rows_of(csv_text(list(points.values()), "success"))
    assert (
        list(rows[0])
        == (
            f"point {RATE} {DECAY} seed state evaluation step steps validation_last validation_best success success_low "
            "success_high successes episodes psnr hours reason"
        ).split()
    )
    assert [float(row["success"]) for row in rows[:9]] == sorted((1 - (i // 2) / 8 for i in range(9)), reverse=True)
    for row in rows[:9]:
        point = points[row["point"]]
        assert {field: float(row[field]) for field in (RATE, DECAY, "seed")} == dict(point.entry.values)
        assert (float(row["validation_last"]), float(row["validation_best"])) == (point.last, point.best)
        interval = wilson_interval(int(row["successes"]), int(row["episodes"]))
        assert (float(row["success_low"]), float(row["success_high"])) == interval
        assert [row[name] for name in ("state", "evaluation", "step", "steps", "psnr", "reason")] == [
            *("finished", "finished", "40", str(STEPS), "", "")
        ]
    states = [(row["state"], row["evaluation"], row["step"], row["success"], row["validation_best"]) for row in rows[9:]]
    assert states == [
        ("failed", "waiting", "20", "", "0.4"),
        ("killed", "waiting", "20", "", "0.8"),
        ("waiting", "waiting", "0", "", ""),
        ("waiting", "waiting", "0", "", ""),
    ]
    assert rows[9]["reason"] == f"ValueError: {ODD}"


def test_the_csv_has_the_metric_and_values_of_any_kind(tmp_path):
    workdir = epath.Path(tmp_path)
    values = [{"data.image_size": [64, 96], "train.lora": True}, {"train.schedule": 'co"s,ine'}]
    for entry, rmse in zip(sweep(workdir, values), (0.3, 0.1 + 0.2), strict=True):
        evaluate(workdir / entry.out, 1, open_loop={"rmse": rmse}, psnr=[20.0, 30.0])
    rows = rows_of(csv_text(read(workdir), "open_loop.rmse"))
    assert [row["open_loop.rmse"] for row in rows] == ["0.3", "0.30000000000000004"]
    assert [row["psnr"] for row in rows] == ["25.0", "25.0"]
    fields = ("data.image_size", "train.lora", "train.schedule")
    assert [[row[field] for field in fields] for row in rows] == [["[64, 96]", "True", ""], ["", "", 'co"s,ine']]
    assert json.loads(rows[0]["data.image_size"]) == [64, 96]


def test_successes_of_seeds_are_pooled_with_wilsons_interval(half_finished):
    groups = {tuple(group.values.values()): group for group in pooled(read(half_finished), "success")}
    counts = {(0.1, 0.0): 16, (0.1, 0.01): 14, (0.1, 0.1): 12, (0.3, 0.0): 10}
    for values, successes in counts.items():
        group = groups[values]
        assert (group.success.successes, group.success.episodes, group.centre) == (successes, 16, successes / 16)
        assert (group.low, group.high) == group.interval == wilson_interval(successes, 16)
    assert list(groups) == [*counts, (0.3, 0.01)]  # best first
    assert (len(groups[0.3, 0.01].numbers), groups[0.3, 0.01].points) == (1, 3)  # of which one repeats another


def test_errors_of_seeds_have_a_mean_a_range_and_students_interval(half_finished):
    groups = {tuple(group.values.values()): group for group in pooled(read(half_finished), "validation")}
    group = groups[0.1, 0.0]
    assert group.numbers == (0.5, 0.5 + 1 / 30) and (group.low, group.high) == group.numbers
    assert group.centre == pytest.approx(0.5 + 1 / 60)
    # of two numbers at a distance d, the standard error of the mean is d / 2
    assert group.interval[1] - group.centre == pytest.approx(12.7062047364 / 60)
    assert groups[0.3, 0.1].interval is None and groups[0.3, 0.1].centre == 0.8


@pytest.mark.parametrize("numbers", [(1.0, 2.0), (0.3, 0.1, 0.2), tuple(x**1.5 for x in range(9))])
def test_the_interval_of_a_mean_is_scipys(numbers):
    scale = scipy.stats.sem(numbers)
    expected = scipy.stats.t.interval(0.95, len(numbers) - 1, loc=statistics.mean(numbers), scale=scale)
    assert mean_interval(numbers) == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def source(half_finished):
    return html_page("rates & <i>decays</i>", read(half_finished), "success")


def test_the_page_is_self_contained_and_well_formed(source):
    assert require_self_contained(source) == ["png"] * 3  # over two fields, and curves


def test_the_page_has_every_point_best_first(source):
    rows = Page(source).rows
    head = [
        "learning_rate",
        "weight_decay",
        "seed",
        "state",
        "reason",
        "step",
        "last validation",
        "lowest validation",
        "success",
        "hours",
    ]
    assert rows[0] == head
    assert rows[1][:9] == ["0.1", "0", "0", "evaluated", "", "40/40", "0.7", "0.5", "8/8 = 100 % (68 to 100)"]
    assert [row[3] for row in rows[1:14]] == ["evaluated"] * 9 + ["failed", "killed", "waiting", "waiting"]
    assert "13 points: 9 evaluated, 1 failed, 1 killed, 2 waiting." in Page(source).text
    assert "Most successful: learning_rate=0.1,weight_decay=0.0,seed=0, with 8/8 = 100 % (68 to 100)." in Page(source).text


def test_the_page_pools_seeds_without_repetitions(source):
    rows = Page(source).rows
    assert ["0.1", "0.01", "2 of 2", "14/16 = 88 % (64 to 97)", "64.0 % to 96.5 %", "87.5 %, 87.5 %"] in rows
    assert ["0.3", "0.01", "1 of 2", "4/8 = 50 % (22 to 78)", "21.5 % to 78.5 %", "50.0 %"] in rows
    assert ["again", "waiting", "learning_rate=0.3,weight_decay=0.01,seed=0"] in rows


def test_the_page_lists_failures_with_their_reasons_escaped(source):
    assert ["learning_rate=0.3,weight_decay=0.01,seed=1", "failed", f"ValueError: {ODD}"] in Page(source).rows
    assert any(row[1:2] == ["killed"] and "out of memory" in row[2] for row in Page(source).rows)
    assert "<b>" not in source and "<i>" not in source and "Sweep rates & <i>decays</i>" in Page(source).words


def test_captions_say_what_the_plots_show(source):
    captions = re.findall("<figcaption>(.*?)</figcaption>", source)
    seeds = "Seeds are pooled: the rate over all their episodes, with its 95 % Wilson interval."
    assert captions[:2] == [
        f"success rate, % over {field}; higher is better. Each line has the same values of all other fields. {seeds}"
        for field in (RATE, DECAY)
    ]
    assert "coloured by one field after the other" in captions[2]


def test_a_page_by_an_error_says_how_many_points_are_not_finished(half_finished):
    text = Page(html_page("t", read(half_finished), "validation")).text
    name = "learning_rate=0.3,weight_decay=0.01,seed=1"
    assert f"Best by lowest validation error: {name}, with 0.4; lower is better." in text
    assert "Of the points with that metric, 2 are not trained to the end: they count with what they have." in text
    assert "Seeds are pooled: their mean, with a bar from the lowest to the highest." in text


def test_a_sweep_that_has_only_begun_has_a_page(tmp_path):
    sweep(epath.Path(tmp_path), [{}])
    write_results(epath.Path(tmp_path), None)
    source = (tmp_path / "sweep.html").read_text()
    text = Page(source).text
    assert require_self_contained(source) == []
    for sentence in (
        "1 point: 1 waiting.",
        "No point has the metric 'validation' yet.",
        "No field but the seed has several values among points with that metric.",
        "No run has metrics yet.",
        "No run has failed or was stopped.",
    ):
        assert sentence in text


def test_many_combinations_are_shown_as_points_with_the_best_of_each_value(tmp_path):
    workdir = epath.Path(tmp_path)
    fields = ("backbone.width", "decoder.width", "train.schedule")
    combinations = itertools.product((64, 128, 256), (64, 128), ("cosine", "constant", "wsd"))
    for i, entry in enumerate(sweep(workdir, [dict(zip(fields, values, strict=True)) for values in combinations])):
        train(workdir / entry.run, [0.9, 0.5 + i / 30])
    source = html_page("t", read(workdir), "validation")
    captions = re.findall("<figcaption>(.*?)</figcaption>", source)
    grey = "Grey: all points. The one in a ring is the best of all. The line goes through the best one of each value."
    lines = "Each line has the same values of all other fields."
    assert captions[0] == f"lowest validation error over backbone.width; lower is better. {lines}"
    assert captions[1] == f"lowest validation error over decoder.width; lower is better. {grey}"
    assert Page(source).rows[0][:3] == ["backbone.width", "decoder.width", "schedule"]  # the last names of two are the same


def _axis(values):
    axes = matplotlib_figure()().subplots()
    place = sweep_report._field_axis(axes, "x", values)
    return axes.get_xscale(), [label.get_text() for label in axes.get_xticklabels()], [place(value) for value in values]


@pytest.mark.parametrize(
    ("values", "scale", "labels", "places"),
    [
        ([1e-4, 3e-4, 1e-3], "log", ["0.0001", "0.0003", "0.001"], [1e-4, 3e-4, 1e-3]),
        ([0.0, 1e-3, 0.1], "symlog", ["0", "0.001", "0.1"], [0.0, 1e-3, 0.1]),
        ([1, 2, 4], "linear", ["1", "2", "4"], [1, 2, 4]),
        ([-1, 100], "linear", ["-1", "100"], [-1, 100]),
        ([False, True], "linear", ["False", "True"], [0, 1]),
        ([None, 1e-4, 1e-3], "linear", ["not set", "0.0001", "0.001"], [0, 1, 2]),
        (["wsd", [8, 8]], "linear", ["wsd", "8+8"], [0, 1]),
    ],
)
def test_an_axis_is_that_of_its_values(values, scale, labels, places):
    assert _axis(values) == (scale, labels, places)


@pytest.mark.parametrize(
    ("values", "scale"), [([1e-4, 1e-3], "log"), ([0.0, 1e-3, 0.1], "symlog"), ([1, 2, 4], "linear"), ([3], "linear")]
)
def test_an_axis_has_room_for_all_of_its_values(values, scale):
    axes = matplotlib_figure()().subplots()
    sweep_report._field_axis(axes, "x", values)
    axes.set_yscale(scale, **({"linthresh": 1e-3} if scale == "symlog" else {}))
    axes.set_ylim(sweep_report._limits(axes.yaxis, values))
    sweep_report._draw(axes, values, [_group_at(value) for value in values], "validation", "black", "", 3.0)
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert low < min(values) and max(values) < high
    assert axes.get_xscale() == scale
    # margins are 7 % of what the values span, so that these end between 2 and 10 % of the axes' width and height
    left, right = axes.transData.inverted().transform(axes.transAxes.transform([[0.02, 0.02], [0.98, 0.98]]))
    assert (left < min(values)).all() and (right > max(values)).all()
    narrow, wide = axes.transData.inverted().transform(axes.transAxes.transform([[0.1, 0.1], [0.9, 0.9]]))
    assert len(values) == 1 or ((narrow > min(values)).all() and (wide < max(values)).all())


def _group_at(value):
    return sweep_report.Group({"x": value}, 1, (value,), value, value, value, None, None)


def test_values_are_in_the_order_of_an_axis():
    groups = [{"x": 3}, {"x": 1}, {}, {"x": 3}]
    assert sweep_report._field_values("x", groups) == [None, 1, 3]
    assert sweep_report._field_values("x", [{"x": "b"}, {"x": [2]}, {"x": "b"}]) == ["b", [2]]


def test_fifty_values_have_a_legend_of_twelve():
    assert sweep_report._spread(range(50)) == [0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 45, 49]
    assert sweep_report._spread(range(5)) == [0, 1, 2, 3, 4]
    assert len(set(sweep_report._colours(list(range(50))))) == 50
    assert sweep_report._colours(["a", "b"]) == list(page.COLOURS[:2])


def test_a_run_that_points_share_is_one_curve_and_what_evaluation_reads_gives_it_no_colour(tmp_path):
    workdir, steps = epath.Path(tmp_path), "policy.action_steps"
    save_entries(workdir, [Entry(f"{r},{n}", {RATE: r, steps: n}, f"{r}", f"{r}/{n}") for r in (0.1, 0.3) for n in (5, 10)])
    for rate in (0.1, 0.3):
        train(workdir / f"{rate}", [0.4, 0.2])
    found = read(workdir)
    assert sweep_report._curve_fields(found, found[::2]) == [RATE]
    save_entries(workdir, [Entry("seed", {RATE: 0.3, "seed": 1}, "seed", "seed")])
    train(workdir / "seed", [0.4, 0.2])
    found = read(workdir)
    assert sweep_report._curve_fields(found, [found[0], found[2], found[4]]) == [RATE]
    assert sweep_report._curve_fields(found[2:], [found[2], found[4]]) == ["seed"]


def test_without_matplotlib_there_is_the_csv_and_a_warning(tmp_path, monkeypatch, caplog):
    def missing():
        raise ModuleNotFoundError("plots need matplotlib: pip install -e '.[report]'")

    monkeypatch.setattr(sweep_report, "matplotlib_figure", missing)
    sweep(epath.Path(tmp_path), [{RATE: 0.1}])
    assert len(write_results(epath.Path(tmp_path), None)) == 1
    assert (tmp_path / "sweep.csv").exists() and not (tmp_path / "sweep.html").exists()
    assert "sweep.html is not written: plots need matplotlib: pip install -e '.[report]'" in caplog.text


def test_a_mistaken_metric_is_refused_and_nothing_is_written(tmp_path):
    (entry,) = sweep(epath.Path(tmp_path), [{}])
    evaluate(epath.Path(tmp_path) / entry.out, 3)
    with pytest.raises(RunError, match=r"no point of the sweep has the metric 'sucess'; did you mean 'success'\?"):
        write_results(epath.Path(tmp_path), "sucess")
    assert not (tmp_path / "sweep.csv").exists()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_fits_the_terminal(half_finished, width):
    file = io.StringIO()
    Console(file=file, width=width).print(table(read(half_finished), None))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["point", "state", "step", "validation", "success", "hours", "reason"]
    shown = [line for line in lines[1:] if any(state in line for state in ("evaluated", "failed", "killed", "waiting"))]
    assert len(shown) == 13 and "100 % (68–100)" in shown[0] and "40/40" in shown[0]
    assert "failed" in shown[9] and "ValueError" in shown[9] and "20/40" in shown[9]
    if width == 200:
        assert "[bold]words[/bold]" in shown[9]


def test_the_table_shows_another_metric_and_psnr(tmp_path):
    workdir = epath.Path(tmp_path)
    (entry,) = sweep(workdir, [{RATE: 0.1}])
    train(workdir / entry.run, [0.4, 0.2], stage="video")
    evaluate(workdir / entry.out, 1, psnr=[20.0, 25.0], success={})
    columns = table(read(workdir), "open_loop.rmse").columns
    cells = {str(column.header): next(iter(column.cells)) for column in columns}
    assert {name: str(cells[name]) for name in ("state", "validation", "success", "psnr", "open_loop.rmse")} == {
        "state": "evaluated",
        "validation": "0.2",
        "success": "",
        "psnr": "22.5",
        "open_loop.rmse": "0.5",
    }
