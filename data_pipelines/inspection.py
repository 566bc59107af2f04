"""What a dataset is, and what its registered entry makes of it: schema, layouts, sample windows, action histograms."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.datasets import directory_name
from data_pipelines.oxe import registry
from data_pipelines.oxe.mixtures import MIXTURES, check_mixture, effective_weights, find_mixture
from data_pipelines.oxe.spec import DatasetSpec, check_schema, expected_features, flatten_features
from data_pipelines.oxe.spec import nearest as nearest_name
from data_pipelines.sources.rlds import RldsSource, open_dataset
from data_pipelines.windows import nearest, video_times
from mimic_video.config import DataConfig
from mimic_video.media import matplotlib_figure
from mimic_video.rerun_log import RerunLog
from mimic_video.transforms import Normalizer, Statistics, clamped, compute_statistics, remarks

_COLUMNS = 8  # frames of a window that are drawn
_HEIGHT = 96  # pixels of a frame
_BINS = 60


def describe(spec: DatasetSpec) -> str:
    """An entry of the registry in words."""
    lines = [
        f"dataset {spec.name}",
        f"  rate         {spec.control_hz:g} Hz",
        f"  cameras      {', '.join(f'{camera}: {key}' for camera, key in spec.cameras.items())}",
        f"  instruction  {spec.language_path}",
        f"  proprio      {spec.proprio or 'none'}",
        f"  actions      {spec.actions or 'none'}",
        f"  serves       {'stages 1 and 2' if spec.labelled else 'stage 1 only'}",
    ]
    return "\n".join(lines + ([f"  notes        {spec.notes}"] if spec.notes else []))


def print_schema(directory: pathlib.Path, spec: DatasetSpec | None) -> None:
    """Every feature that is there, beside what is expected of it, and cameras that are not.

    Raises SchemaError as `check_schema`, but for cameras besides the primary one, which training does without.
    """
    features = flatten_features(open_dataset(directory).features)
    expected = expected_features(spec) if spec else {}
    width = max(map(len, features))
    print(f"features of {directory}")
    for path, feature in sorted(features.items()):
        print(f"  {path:{width}}  {feature}" + (f"; expected {expected[path]}" if path in expected else ""))
    if spec:
        check_schema(features, dataclasses.replace(spec, secondary=None, wrist=None))
        for camera, key in spec.cameras.items():
            if f"steps/observation/{key}" not in features:
                print(f"  left out camera '{camera}': there is no 'steps/observation/{key}'")


def draw_windows(source: RldsSource, count: int) -> tuple[Image.Image, list[str]]:
    """A strip of frames for every camera of `count` windows of the published length, and a line of text for each strip."""
    config, strips, captions = DataConfig(), [], []
    for number in spread(len(source), count):
        episode = source[number]
        anchor = len(episode) // 2
        times = video_times(episode.timestamps[anchor], config)
        times = times[np.linspace(0, len(times) - 1, _COLUMNS).round().astype(int)]
        steps, rows = np.unique(nearest(episode.timestamps, times), return_inverse=True)
        for camera, frames in episode.cameras.items():
            pictures = [thumbnail(frame) for frame in frames.take(steps.tolist())]
            strips.append(np.concatenate([pictures[row] for row in rows], axis=1))
            first, last = times[[0, -1]] - episode.timestamps[anchor]
            captions.append(
                f"episode {source.numbers[number]}, {camera}, {first:+.1f} to {last:+.1f} s around step {anchor} "
                f"of {len(episode)}: {episode.instruction_at(anchor)!r}"
            )
    width = max(strip.shape[1] for strip in strips)
    return Image.fromarray(np.concatenate([np.pad(s, ((0, 2), (0, width - s.shape[1]), (0, 0))) for s in strips])), captions


def log_episodes(log: RerunLog, name: str, source: RldsSource, count: int) -> None:
    """At most `count` whole episodes, spread over the split: cameras, instruction, proprioception and actions."""
    for number in spread(len(source), count):
        episode = source[number]
        steps = list(range(len(episode)))
        log.episode(
            f"{name}/episode_{source.numbers[number]}",
            episode.timestamps - episode.timestamps[0],
            {camera: frames.take(steps) for camera, frames in episode.cameras.items()},
            episode.proprio,
            episode.actions,
            [episode.instruction_at(step) for step in steps],
        )


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) → (`_HEIGHT`, ..., 3)."""
    height, width = frame.shape[:2]
    size = max(1, round(width * _HEIGHT / height)), _HEIGHT
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def plot_histograms(actions: np.ndarray, labels: Sequence[str], path: pathlib.Path) -> None:
    """Writes one histogram per dimension of actions (n, m)."""
    columns = min(5, actions.shape[1])
    rows = -(-actions.shape[1] // columns)
    figure = matplotlib_figure()(figsize=(3 * columns, 2 * rows), layout="constrained")
    for i, axes in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
        if i >= actions.shape[1]:
            axes.axis("off")
            continue
        axes.hist(actions[:, i], bins=_BINS)
        axes.set_title(labels[i], fontsize=8)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is looked at, and where pictures go."""

    split: str
    out: pathlib.Path  # holds one folder per dataset
    episodes: int  # spread over the split, that histograms are of
    samples: int  # windows that are drawn, and episodes that are logged
    log: RerunLog | None = None


def inspect_dataset(directory: pathlib.Path, name: str, spec: DatasetSpec | None, options: Inspection) -> None:
    """Schema, windows and histograms of a prepared dataset; without an entry it is read as one of our own layout."""
    out = options.out / name
    print_schema(directory, spec)
    source = RldsSource(directory, options.split, spec=spec)
    print(f"{source.name}: {len(source)} episodes")
    out.mkdir(parents=True, exist_ok=True)
    picture, captions = draw_windows(source, options.samples)
    picture.save(out / "windows.png")
    print(f"wrote {out / 'windows.png'}; its rows are", *captions, sep="\n  ")

    if options.log is not None:
        log_episodes(options.log, name, source, options.samples)

    episodes = [source[number] for number in spread(len(source), options.episodes)]
    actions = [episode.actions for episode in episodes if episode.actions is not None]
    proprio = [episode.proprio for episode in episodes if episode.proprio is not None]
    if proprio:
        rotations = spec.proprio.rotation_dims if spec and spec.proprio else ()
        print_remarks("proprio", compute_statistics(np.concatenate(proprio)[:, None]), rotations)
    if not actions:
        print("no actions: no histograms")
        return
    values, rotations = np.concatenate(actions), spec.actions.rotation_dims if spec and spec.actions else ()
    labels = spec.actions.dimensions if spec and spec.actions else [f"action {i}" for i in range(values.shape[1])]
    plot_histograms(values, labels, out / "actions.png")
    print(f"wrote {out / 'actions.png'}: {len(values)} steps of {len(actions)} episodes")
    width = max(map(len, labels))
    print(f"  {'':{width}}  {'minimum':>10} {'mean':>10} {'maximum':>10}  beyond compat.percentile_clamp")
    statistics = compute_statistics(values[:, None])
    beyond = clamped(statistics, _normalizer("action", statistics, rotations, percentile_clamp=True))[0]
    for label, column, share in zip(labels, values.T, beyond, strict=True):
        print(f"  {label:{width}}  {column.min():10.4f} {column.mean():10.4f} {column.max():10.4f} {share:7.1%}")
    print_remarks("action", statistics, rotations)


def print_remarks(key: str, statistics: Statistics, raw_dims: Sequence[int]) -> None:
    """`transforms.remarks`, with and without the published clamp."""
    for clamp in (False, True):
        for remark in remarks(statistics, _normalizer(key, statistics, raw_dims, clamp)):
            print(f"  {remark}")


def _normalizer(key: str, statistics: Statistics, raw_dims: Sequence[int], percentile_clamp: bool) -> Normalizer:
    return Normalizer.from_statistics(statistics, "variance", key, raw_dims, percentile_clamp=percentile_clamp)


def inspect_mixture(name: str, root: pathlib.Path | None, split: str) -> None:
    """Weights of a mixture and, with the folder of its datasets, the shares of samples that they come to."""
    weights = find_mixture(name)
    check_mixture(weights)
    sizes: dict[str, int] = {}
    for dataset in weights:
        versions = sorted(root.glob(f"{dataset}/*/features.json")) if root else []
        if versions:
            source = RldsSource(versions[-1].parent, split, spec=registry.find(dataset))
            sizes[dataset] = sum(len(episode) for episode in source)
    here = {dataset: weight for dataset, weight in weights.items() if dataset in sizes}
    shares = effective_weights(here, sizes) if here else {}
    what = f"weights, steps and shares of samples; {len(here)} of its {len(weights)} datasets are here" if root else "weights"
    print(f"mixture {name}: {what}")
    width = max(map(len, weights))
    for dataset, weight in weights.items():
        spec = registry.find(dataset)
        cells = [f"{dataset:{width}}", f"{weight:8.4f}"]
        if root:
            cells += [f"{sizes[dataset]:12,d}", f"{shares[dataset]:8.4f}"] if dataset in sizes else [f"{'not here':>12}", " " * 8]
        print(" ", *cells, spec.action_layout if spec.labelled else "stage 1 only")


def spread(length: int, count: int) -> list[int]:
    """At most `count` different indices, evenly over 0 to length − 1."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def inspect(name: str | None, directory: pathlib.Path | None, options: Inspection) -> None:
    """Prints what is known of a dataset or a mixture and, of what is there, writes `windows.png` and `actions.png`.

    Args:
        name: of a registered dataset or a mixture; by default that of the folder, which need not be registered.
        directory: a prepared dataset's version, or the folder of a mixture's datasets.

    Raises:
        ValueError: for a name that there is not; DatasetError and SchemaError are such, as of `RldsSource` and `check_schema`.
    """
    if name is None:
        if directory is None:
            raise ValueError("there is nothing to inspect; expected --dataset=NAME, --source=DIRECTORY, or both")
        name = directory_name(directory.resolve())
        spec = registry.find(name) if name in registry.names() else None
        print(describe(spec) if spec else f"dataset {name}: not registered; read as one of our own layout")
        inspect_dataset(directory, name, spec, options)
        return
    known, mixed = name in registry.names(), name in MIXTURES
    if not known and not mixed:
        raise ValueError(f"no dataset or mixture '{name}'{nearest_name(name, [*registry.names(), *MIXTURES])}")
    prepared = directory is not None and (directory / "features.json").is_file()
    if known:
        spec = registry.find(name)
        print(describe(spec))
        if directory and (prepared or not mixed):
            inspect_dataset(directory, name, spec, options)
    if mixed and not prepared:
        inspect_mixture(name, directory, options.split)
