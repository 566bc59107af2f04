"""A sweep's results for people and programs: a table for the terminal, `sweep.csv`, and `sweep.html`, which is self-contained.

All of them are computed from the files of the sweep's runs, whether it has ended or not.
"""

import collections
import csv
import dataclasses
import html
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from absl import logging
from etils import epath
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from mimic_video.atomic import atomically
from mimic_video.evaluation import page
from mimic_video.evaluation.sweep_results import (
    Curve,
    Result,
    Success,
    chosen_metric,
    higher_is_better,
    is_number,
    load_entries,
    number,
    ranked,
    require_metric,
    results,
    short_names,
)
from mimic_video.media import matplotlib_figure
from mimic_video.runs.storage import Spool

_T = TypeVar("_T")
_SEED = "seed"  # the field whose values are repetitions of the same experiment
_LINES = 6  # of a plot, at most, each in a colour of its own
_TICKS = 8  # values that an axis names, at most
_AXIS = 80  # characters that fit below an axis
_MARKED = 20  # points of a curve that are marked, at most
_ENTRIES = 12  # of a legend, at most
_ROWS = 3  # of curves, each coloured by another field
_REASON = 60  # characters of a reason in a table
_NOT_SET = "not set"  # of a field that other points of the sweep set
_STYLES = {"failed": "red", "killed": "red", "stopped": "yellow", "running": "cyan", "evaluating": "cyan", "evaluated": "green"}


def write_results(workdir: epath.Path, metric: str | None) -> list[Result]:
    """Writes sweep.csv and sweep.html into the folder of a sweep, also one in a bucket; gives its points, best first.

    Without matplotlib there is no page, and a warning.

    Args:
        metric: that points are compared by, as of sweep_results.py; None for success or, where there is none, validation.

    Raises:
        RunError: if no sweep was started there, the metric is none (`require_metric`), or a bucket does not take the files.
    """
    points = results(workdir, load_entries(workdir))
    metric = chosen_metric(points, metric)
    require_metric(points, metric)
    texts = {"sweep.csv": csv_text(points, metric)}
    try:
        matplotlib_figure()
    except ModuleNotFoundError as error:
        logging.warning("%s/sweep.html is not written: %s", workdir, error)
    else:
        texts["sweep.html"] = html_page(workdir.name, points, metric)
    with Spool(workdir) as spool:
        for name, text in texts.items():
            with atomically(spool.path / name) as partial:
                partial.write_text(text, encoding="utf-8")
    return ranked(points, metric)


def table(results: Sequence[Result], metric: str | None) -> Table:
    """For the terminal: the points, best first. Names and reasons share what the other columns leave of its width."""
    metric = chosen_metric(results, metric)
    found = Table(box=None, pad_edge=False, header_style="bold")
    found.add_column("point", overflow="fold", min_width=12)
    found.add_column("state", no_wrap=True)
    others = _others(results, metric)
    for name in ("step", "validation", "success", *others, "hours"):
        found.add_column(Text(name), justify="right", no_wrap=True)
    reasons = any(point.reason for point in results)
    if reasons:
        found.add_column("reason", min_width=12)
    for point in ranked(results, metric):
        state = Text(point.state, _STYLES.get(point.state.split()[-1], ""))
        numbers = [_error(number(point, name)) for name in others]
        reason = [Text(point.reason, no_wrap=True, overflow="ellipsis")] * reasons
        cells = (_step(point), _error(point.best), _rate(point.success), *numbers, _hours(point))
        found.add_row(Text(point.entry.name), state, *cells, *reason)
    return found


def csv_text(results: Sequence[Result], metric: str) -> str:
    """A row for each point, best first; numbers as they are, and nothing where there is none.

    Columns are `point`; the swept fields by their paths; `state` of training and of `evaluation`; `step`, `steps` and `hours` of
    training; `validation_last` and `validation_best`, the newest and the lowest validation error; `success`, `success_low` and
    `success_high` (its 95 % interval), `successes` and `episodes`; `psnr`; the metric, if it is another one; and `reason`.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fields = _fields(results)
    for i, point in enumerate(ranked(results, metric)):
        row = {"point": point.entry.name, **{field: _cell(point.entry.values.get(field)) for field in fields}}
        row |= {"state": point.training.state, "evaluation": point.evaluation.state}
        row |= {"step": point.step, "steps": point.training.steps}
        row |= {"validation_last": point.last, "validation_best": point.best}
        success = point.success
        row |= {"success": success and success.rate}
        row |= dict(zip(("success_low", "success_high"), success.interval if success else (None, None), strict=True))
        row |= {"successes": success and success.successes, "episodes": success and success.episodes}
        row |= {name: number(point, name) for name in ("psnr", *_others([], metric))}
        row |= {"hours": point.hours, "reason": point.reason}
        writer.writerows([row.keys(), row.values()] if i == 0 else [row.values()])
    return file.getvalue()


def html_page(title: str, results: Sequence[Result], metric: str) -> str:
    """The page. Raises ModuleNotFoundError without matplotlib."""
    distinct, repeated = _distinct(results)
    groups = pooled(distinct, metric)
    fields = [field for field in _fields(distinct) if field != _SEED]
    names = short_names(_fields(results))
    parts = [
        f"<h1>{html.escape(f'Sweep {title}')}</h1>",
        _summary(results, metric),
        page.section("Points", _points(results, metric, names)),
    ]
    if any(_SEED in point.entry.values for point in distinct):
        parts.append(page.section("Over seeds", _over_seeds(groups, metric, names)))
    plots = [_field_plot(field, groups, metric, names) for field in fields if _differs(field, groups)]
    nothing = page.paragraph("No field but the seed has several values among points with that metric.")
    parts.append(page.section("By field", *(plots or [nothing])))
    parts.append(page.section("Curves", _curves(distinct, names)))
    parts.append(page.section("Failures and repetitions", _failures(results), _repetitions(repeated)))
    return page.document(f"Sweep {title}", "\n".join(parts))


# Pooling over seeds.


@dataclasses.dataclass(frozen=True)
class Group:
    """Points that differ only in their seed.

    Attributes:
        values: of the swept fields, without the seed.
        points: how many there are, whether they have the metric or not.
        numbers: the metric, of those that have it.
        centre: of success the rate over all episodes; of other metrics the mean.
        low, high: of success the 95 % Wilson interval over all episodes; of other metrics the lowest and the highest.
        interval: of success as before; of other metrics the 95 % interval of the mean by Student's t, None for a single number.
        success: over all episodes.
    """

    values: Mapping[str, Any]
    points: int
    numbers: tuple[float, ...]
    centre: float
    low: float
    high: float
    interval: tuple[float, float] | None
    success: Success | None


def pooled(results: Iterable[Result], metric: str) -> list[Group]:
    """Points by the values of their fields other than the seed, best first, without those whose points all lack the metric."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(_key(_without(result.entry.values, _SEED)), []).append(result)
    groups = [group for points in found.values() if (group := _group(points, metric))]
    return sorted(groups, key=lambda group: group.centre, reverse=higher_is_better(metric))


def _group(points: Sequence[Result], metric: str) -> Group | None:
    numbers = tuple(value for point in points if (value := number(point, metric)) is not None)
    values = _without(points[0].entry.values, _SEED)
    if not numbers:
        return None
    if metric == "success":
        each = [point.success for point in points if point.success]
        success = Success(sum(one.successes for one in each), sum(one.episodes for one in each))
        return Group(values, len(points), numbers, success.rate, *success.interval, success.interval, success)
    mean = statistics.mean(numbers)
    return Group(values, len(points), numbers, mean, min(numbers), max(numbers), mean_interval(numbers), None)


def mean_interval(numbers: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of a normal distribution, by Student's t; None for fewer than two numbers."""
    if len(numbers) < 2:
        return None
    margin = float(stdtrit(len(numbers) - 1, 0.975)) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return statistics.mean(numbers) - margin, statistics.mean(numbers) + margin


def _distinct(results: Iterable[Result]) -> tuple[list[Result], list[tuple[Result, Result]]]:
    """Points whose values differ, and those that repeat an earlier one's, each with that one."""
    first: dict[str, Result] = {}
    repeated = []
    for result in results:
        other = first.setdefault(_key(result.entry.values), result)
        if other is not result:
            repeated.append((result, other))
    return list(first.values()), repeated


def _key(values: Any) -> str:
    return json.dumps(values, sort_keys=True)


def _without(values: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    return {field: value for field, value in values.items() if field not in fields}


# Words and numbers.


def _fields(results: Iterable[Result]) -> list[str]:
    """Those that any point sets, by their paths."""
    return list(dict.fromkeys(field for result in results for field in result.entry.values))


def _others(results: Iterable[Result], metric: str) -> list[str]:
    """What tables have beside success and validation: PSNR of stage `video`, and the metric."""
    psnr = ["psnr"] * any(number(point, "psnr") is not None for point in results)
    return list(dict.fromkeys(name for name in (*psnr, metric) if name not in ("success", "validation")))


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _labels(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return ", ".join(f"{names[field]}={_text(value)}" for field, value in values.items())


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _success(success: Success | None) -> str:
    if success is None:
        return ""
    low, high = success.interval
    return f"{success.successes}/{success.episodes} = {100 * success.rate:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _rate(success: Success | None) -> str:
    """As `_success`, but shorter."""
    if success is None:
        return ""
    low, high = success.interval
    return f"{100 * success.rate:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def _step(point: Result) -> str:
    return f"{point.step}/{point.training.steps}" if point.training.steps else ""


def _hours(point: Result) -> str:
    return f"{point.hours:.2f}" if point.training.seconds else ""


def _cut(text: str) -> str:
    return text if len(text) <= _REASON else f"{text[: _REASON - 1]}…"


def _title(metric: str) -> str:
    return {"success": "success rate, %", "validation": "lowest validation error"}.get(metric, metric)


def _amount(value: float, metric: str) -> str:
    return f"{100 * value:.1f} %" if metric == "success" else f"{value:.4g}"


def _better(metric: str) -> str:
    return "higher is better" if higher_is_better(metric) else "lower is better"


# Sections.


def _summary(results: Sequence[Result], metric: str) -> str:
    states = collections.Counter(point.state for point in results)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    lines = [f"{len(results)} point{'s' * (len(results) != 1)}: {counts}. Read at {time.strftime('%F %T', time.gmtime())} UTC."]
    first = next(iter(ranked(results, metric)), None)
    if first is None or number(first, metric) is None:
        lines.append(f"No point has the metric {metric!r} yet.")
    elif metric == "success":
        lines.append(f"Most successful: {first.entry.name}, with {_success(first.success)}.")
    else:
        lines.append(f"Best by {_title(metric)}: {first.entry.name}, with {_error(number(first, metric))}; {_better(metric)}.")
    if unfinished := sum(point.training.state != "finished" and number(point, metric) is not None for point in results):
        lines.append(f"Of the points with that metric, {unfinished} are not trained to the end: they count with what they have.")
    return "\n".join(map(page.paragraph, lines))


def _points(results: Sequence[Result], metric: str, names: Mapping[str, str]) -> str:
    reasons, others = ["reason"] * any(point.reason for point in results), _others(results, metric)
    head = [
        *names.values(),
        "state",
        *reasons,
        "step",
        "last validation",
        "lowest validation",
        "success",
        *others,
        "hours",
    ]
    rows = [
        [
            *(_text(point.entry.values[field]) if field in point.entry.values else "" for field in names),
            point.state,
            *(_cut(point.reason) for _ in reasons),
            _step(point),
            _error(point.last),
            _error(point.best),
            _success(point.success),
            *(_error(number(point, name)) for name in others),
            _hours(point),
        ]
        for point in ranked(results, metric)
    ]
    caption = (
        f"Best first, by {_title(metric).removesuffix(', %')}; {_better(metric)}. Validation errors are mean squared errors of "
        "velocities on held-out windows. Success has its 95 % interval, Wilson's. Hours are those of training, in all its starts."
    )
    return page.table(head, [rows], len(names) + 1 + len(reasons), caption)


def _over_seeds(groups: Sequence[Group], metric: str, names: Mapping[str, str]) -> str:
    fields = list(dict.fromkeys(field for group in groups for field in group.values))
    head = [*(names[field] for field in fields), "seeds", "all" if metric == "success" else "mean", "95 % interval", "each"]
    rows = [
        [
            *(_text(group.values[field]) if field in group.values else "" for field in fields),
            f"{len(group.numbers)} of {group.points}",
            _success(group.success) if group.success else _amount(group.centre, metric),
            " to ".join(_amount(value, metric) for value in group.interval) if group.interval else "",
            ", ".join(_amount(value, metric) for value in group.numbers),
        ]
        for group in groups
    ]
    how = (
        "Episodes of all seeds are pooled; intervals are Wilson's, and cover the choice of episodes, not that of training seeds."
        if metric == "success"
        else "Intervals are those of the mean by Student's t; of few seeds they are wide."
    )
    return page.table(head, [rows], len(fields), f"{_title(metric)}, best first; {_better(metric)}. {how}")


def _failures(results: Iterable[Result]) -> str:
    rows = [[point.entry.name, point.state, point.reason] for point in results if point.reason]
    if not rows:
        return page.paragraph("No run has failed or was stopped.")
    return page.table(["point", "state", "reason"], [rows], 3, "What kept runs from getting on, by their own words.")


def _repetitions(repeated: Sequence[tuple[Result, Result]]) -> str:
    if not repeated:
        return ""
    rows = [[point.entry.name, point.state, first.entry.name] for point, first in repeated]
    return page.table(["point", "state", "same values as"], [rows], 3, "Repeated points are left out of all plots and means.")


# The metric over the values of a field.


def _field_values(field: str, points: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Values of a field in the order of an axis: numbers by size, others as they come; None is first, for points without it."""
    found = {_key(values.get(field)): values.get(field) for values in points}
    values = [value for value in found.values() if value is not None]
    if all(map(is_number, values)):
        values.sort()
    return [None] * (len(found) - len(values)) + values


def _differs(field: str, groups: Iterable[Group]) -> bool:
    return len({_key(group.values.get(field)) for group in groups}) > 1


def _field_plot(field: str, groups: Sequence[Group], metric: str, names: Mapping[str, str]) -> str:
    order = {name: _field_values(name, [group.values for group in groups]) for name in names if name != _SEED}
    others, values = [name for name in order if name != field], order[field]
    lines: dict[str, list[Group]] = {}  # by the values of the other fields
    for group in sorted(groups, key=lambda group: [order[name].index(group.values.get(name)) for name in (*others, field)]):
        lines.setdefault(_key(_without(group.values, field)), []).append(group)
    figure = matplotlib_figure()(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    place = _field_axis(axes, names[field], values)

    def draw(members: Sequence[Group], colour: str, label: str = "", points: float = 0.0) -> None:
        _draw(axes, [place(group.values.get(field)) for group in members], members, metric, colour, label, points)

    if len(lines) <= _LINES:
        how = "Each line has the same values of all other fields." if len(lines) > 1 else ""
        for i, members in enumerate(lines.values()):
            draw(members, page.colour(i), _labels(_without(members[0].values, field), names), 6 * (i - (len(lines) - 1) / 2))
    else:
        how = "Grey: all points. The one in a ring is the best of all."
        places = [place(group.values.get(field)) for group in groups]
        axes.plot(places, [_scaled(group.centre, metric) for group in groups], "o", ms=4.5, color=page.LIGHT)
        best = {_key(group.values.get(field)): group for group in reversed(groups)}  # of each value
        if len(best) <= len(groups) / 2:
            how += " The line goes through the best one of each value."
            draw(sorted(best.values(), key=lambda group: values.index(group.values.get(field))), page.COLOURS[0])
        axes.plot(places[0], _scaled(groups[0].centre, metric), "o", ms=10, mew=2, mfc="none", color=page.COLOURS[1], zorder=5)
    _metric_axis(axes, groups, metric)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    caption = f"{_title(metric)} over {field}; {_better(metric)}. {how} {_bars(groups, metric)}"
    return page.plot(figure, f"{_title(metric)} over {field}", " ".join(caption.split()))


def _bars(groups: Iterable[Group], metric: str) -> str:
    """What points and bars of a plot are, in words."""
    if metric == "success":
        return "Seeds are pooled: the rate over all their episodes, with its 95 % Wilson interval."
    if any(len(group.numbers) > 1 for group in groups):
        return "Seeds are pooled: their mean, with a bar from the lowest to the highest."
    return ""


def _field_axis(axes: Any, name: str, values: Sequence[Any]) -> Callable[[Any], float]:
    """Prepares the horizontal axis of a field; gives value → place on it."""
    axes.set_xlabel(name)
    if not all(map(is_number, values)):
        texts = [_NOT_SET if value is None else _text(value) for value in values]
        long = sum(map(len, texts)) > _AXIS
        axes.set_xticks(range(len(values)), texts, **({"rotation": 30, "ha": "right"} if long else {}))
        axes.set_xlim(-0.5, len(values) - 0.5)
        return values.index
    positive = [value for value in values if value > 0]
    if values[0] == 0 and _spans_decades(positive):
        axes.set_xscale("symlog", linthresh=positive[0])
    elif values[0] > 0 and _spans_decades(values):
        axes.set_xscale("log")
    axes.set_xlim(_limits(axes.xaxis, values))
    if len(values) <= _TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    return lambda value: value


def _spans_decades(values: Sequence[float]) -> bool:
    """Of positive numbers."""
    return len(values) > 1 and max(values) >= 10 * min(values)


def _metric_axis(axes: Any, groups: Sequence[Group], metric: str) -> None:
    axes.set_ylabel(_title(metric))
    axes.grid(alpha=0.3)
    if metric == "success":
        axes.set_ylim(-3, 103)
        return
    ends = [end for group in groups for end in (group.low, group.high)]
    if min(ends) > 0 and _spans_decades(ends):
        axes.set_yscale("log")
    axes.set_ylim(_limits(axes.yaxis, ends))


def _limits(axis: Any, values: Sequence[float]) -> list[float]:
    """Ends of an axis that has room for values, on its scale. (matplotlib does not find them for what `_draw` moves.)"""
    transform = axis.get_transform()
    low, high = transform.transform([min(values), max(values)])
    margin = 0.07 * (high - low) or 0.1 * abs(low) or 1.0
    return transform.inverted().transform([low - margin, high + margin])


def _scaled(value: float, metric: str) -> float:
    return 100 * value if metric == "success" else value


def _draw(
    axes: Any, places: Sequence[float], groups: Sequence[Group], metric: str, colour: str, label: str, shift: float
) -> None:
    """Draws groups with their bars, moved to the right by `shift` points, so that those at the same place can be told apart."""
    from matplotlib.transforms import ScaledTranslation

    transform = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    centres, lows, highs = ([_scaled(value, metric) for value in column] for column in zip(*map(_extent, groups), strict=True))
    below = [centre - low for centre, low in zip(centres, lows, strict=True)]
    above = [high - centre for centre, high in zip(centres, highs, strict=True)]
    style = {"color": colour, "lw": 1.3, "elinewidth": 1, "capsize": 2, "marker": "o", "ms": 4.5}
    axes.errorbar(places, centres, (below, above), label=label or None, transform=transform, **style)


def _extent(group: Group) -> tuple[float, float, float]:
    return group.centre, group.low, group.high


# Curves.


def _curves(results: Sequence[Result], names: Mapping[str, str]) -> str:
    runs = list({result.entry.run: result for result in results if result.metrics.training or result.metrics.validation}.values())
    if not runs:
        return page.paragraph("No run has metrics yet.")
    fields = _curve_fields(results, runs)
    shown: list[str | None] = [*fields[:_ROWS]] or [None]
    figure = matplotlib_figure()(figsize=(9, 3.3 * len(shown)), layout="constrained")
    for row, field in zip(figure.subfigures(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        _curve_row(row, runs, field, names)
    caption = (
        "Mean squared velocity error in training (left) and on held-out windows (right), one line per run, on logarithmic axes; "
        "× ends a run that failed, was killed or is stopped. "
    )
    if len(fields) > 1:
        caption += "The rows show the same runs, coloured by one field after the other. "
    if hidden := fields[_ROWS:]:
        caption += f"There are no rows for {', '.join(hidden)}."
    return page.plot(figure, "training and validation errors of all runs", caption)


def _curve_fields(results: Iterable[Result], runs: Sequence[Result]) -> list[str]:
    """Those that runs differ in, by which curves can be coloured: the seed only without others, and none of evaluation alone."""
    values: dict[str, dict[str, set[str]]] = {}
    for result in results:
        for field, value in result.entry.values.items():
            values.setdefault(field, {}).setdefault(result.entry.run, set()).add(_key(value))
    of_training = [field for field, by_run in values.items() if all(len(each) == 1 for each in by_run.values())]
    different = [field for field in of_training if len({_key(run.entry.values.get(field)) for run in runs}) > 1]
    return [field for field in different if field != _SEED] or different


def _curve_row(figure: Any, runs: Sequence[Result], field: str | None, names: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    values = _field_values(field, [run.entry.values for run in runs]) if field else [None]
    colours = _colours(values)
    left, right = figure.subplots(1, 2)
    for run in runs:
        colour = colours[values.index(run.entry.values.get(field) if field else None)]
        over = run.training.state in ("failed", "killed", "stopped")
        _curve(left, run.metrics.training, colour, over, lw=0.8, alpha=0.7)
        _curve(right, run.metrics.validation, colour, over, lw=1.1, alpha=0.8)
    for axes, title in ((left, "training"), (right, "held out")):
        axes.set(title=title, xlabel="training step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    left.set_ylabel("flow-matching error")
    if field:
        named = _spread(list(zip(values, colours, strict=True)))
        handles = [Line2D([], [], color=colour, label=_NOT_SET if value is None else _text(value)) for value, colour in named]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small", title=names[field])


def _curve(axes: Any, curve: Curve, colour: Any, over: bool, **style: Any) -> None:
    if curve:
        marker = "o" if len(curve) <= _MARKED else ""
        axes.plot(*zip(*curve, strict=True), color=colour, marker=marker, ms=2.5, **style)
        if over:
            axes.plot(*curve[-1], "x", color=colour, ms=7, mew=2)


def _colours(values: Sequence[Any]) -> list[Any]:
    """Of a field's values: numbers, and categories that are many, go from dark to light."""
    from matplotlib import colormaps

    if len(values) <= len(page.COLOURS) and not all(map(is_number, values)):
        return list(page.COLOURS[: len(values)])
    return [colormaps["viridis"](0.85 * i / max(len(values) - 1, 1)) for i in range(len(values))]


def _spread(entries: Sequence[_T]) -> list[_T]:
    """All of a few; of many, some from the first to the last."""
    last = len(entries) - 1
    return list(entries) if last < _ENTRIES else [entries[round(i * last / (_ENTRIES - 1))] for i in range(_ENTRIES)]
