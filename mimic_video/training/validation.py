"""What a stage gets right on held-out batches, under noise that is the same every time."""

import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from mimic_video.batch import Batch
from mimic_video.config import DataConfig
from mimic_video.flow import matching, solvers
from mimic_video.media import film_strip, matplotlib_figure, stacked, write_video
from mimic_video.parallel.sharding import MeshFunction, global_batch
from mimic_video.stages import join_params
from mimic_video.training.metrics import MetricWriter
from mimic_video.training.steps import make_validation_step
from mimic_video.vam import Latents, Params, VideoActionModel

Curves = Callable[[Params, Params, Sequence[Batch]], dict[str, float]]
Videos = tuple[UInt8[Array, "b v f h w 3"], UInt8[Array, "b v f h w 3"]]  # real, predicted

_LEVELS = 10  # noise levels of the video error
_CURVE_POINTS = 12  # τ_v of the action errors
_VIDEOS = 4  # that are shown, at most
_COLUMNS, _SHOWN_SIZE = 6, 240  # frames of a row, and their size in pixels, at most


def make_validation(
    vam: VideoActionModel, mesh: Mesh, batches: Sequence[Batch]
) -> Callable[[int, Params, Params, MetricWriter], dict[str, float]]:
    """(step, trained parameters, frozen parameters, writer) → metrics, averaged over the fixed `batches` (this process's rows).

    `validation_video_mse` or `validation_action_mse` is the error that is trained on, at random noise levels. With
    `train.validation_curves` there is also what `make_video_curve` or `make_action_curves` says, and

    * of stage `video`: predicted videos beside the real ones, in run/samples/STEP.gif and, a few frames of them, the writer;
    * of stage `action`: if matplotlib is installed (extra `report`), the curves as a picture in the writer.
    """
    settings, stage = vam.config.train, vam.config.stage
    loss = make_validation_step(vam, mesh)
    parts = [global_batch(batch, mesh) for batch in batches]
    if settings.validation_curves and batches:
        curves = {"video": make_video_curve, "action": make_action_curves}[stage](vam, mesh)
        sample = make_video_samples(vam, mesh)

    def validate(step: int, params: Params, frozen: Params, writer: MetricWriter) -> dict[str, float]:
        collected = jax.device_get([loss(params, frozen, batch) for batch in parts])
        values = {f"validation_{name}": float(np.mean([metrics[name] for metrics in collected])) for name in collected[0]}
        if settings.validation_curves:
            values |= (found := curves(params, frozen, parts))
            videos = sample(params, frozen, parts[0]) if stage == "video" else None
            if jax.process_index() == 0:
                if videos is not None:
                    _show_videos(step, videos, vam.config.data, writer)
                elif importlib.util.find_spec("matplotlib"):
                    writer.write_image(step, "validation_curves", draw_curves(found))
        return values

    return validate


def make_video_curve(vam: VideoActionModel, mesh: Mesh) -> Curves:
    """`validation_video_mse/sigma_S` at fixed noise levels σ: the medians of ten equally likely parts of those in training."""

    def error(params: Params, frozen: Params, batch: Batch, time: Float[Array, ""]) -> Float[Array, ""]:
        size = len(batch.frame_mask)
        draws = vam.draw(jax.random.key(vam.config.seed), size) | {"video_time": jnp.full(size, time)}
        return vam.video_loss(join_params(params, frozen, vam.config), batch, draws)[1]["video_mse"].value

    compiled = MeshFunction(jax.jit(error), mesh)
    sigmas = matching.video_sigma_quantiles((np.arange(_LEVELS) + 0.5) / _LEVELS, vam.config.noise)

    def curve(params: Params, frozen: Params, batches: Sequence[Batch]) -> dict[str, float]:
        errors = [[compiled(params, frozen, batch, matching.flow_time(sigma)) for batch in batches] for sigma in sigmas]
        return {
            f"validation_video_mse/sigma_{sigma:.3g}": float(np.mean(each))
            for sigma, each in zip(sigmas, jax.device_get(errors), strict=True)
        }

    return curve


def make_action_curves(vam: VideoActionModel, mesh: Mesh) -> Curves:
    """Mean squared errors of sampled actions, over the flow time τ_v at which the decoder reads the backbone (SPEC 7).

    At twelve τ_v of the video sampler's grid, from pure noise on, there are

    * `validation_action_mse/ground_truth_video/tau_T`: at the true video, noised to τ_v;
    * `validation_action_mse/generated_video/tau_T`: at what the video sampler has come to by then;
    * `validation_action_mse_raw/…`: both in raw units, for batches with `action_scale`.

    Padded actions, and dimensions that a robot lacks, do not count. Recorded actions are as the normaliser clamps them.
    """
    grid = solvers.karras_sigmas(vam.config.policy.video_steps)
    steps = np.unique(np.linspace(0, len(grid) - 1, _CURVE_POINTS).round().astype(int)).tolist()
    times = matching.flow_time(grid[steps])
    key = jax.random.key(vam.config.seed)

    def with_mesh(function: Callable) -> MeshFunction:
        return MeshFunction(jax.jit(function), mesh)

    @with_mesh
    def generate(frozen: Params, batch: Batch) -> tuple[Latents, Latents, list[Latents]]:
        """A batch's latents, noise, and x_τ on the sampler's way."""
        latents = vam.latents(frozen, batch.observation)
        noise = vam.draw_noise(key, len(latents))["video"]
        return latents, noise, vam.sample_path(frozen, vam.condition_on_past(latents, batch.observation), noise, steps)

    @with_mesh
    def noised(latents: Latents, noise: Latents, time: Float[Array, ""]) -> Latents:
        return matching.interpolate(latents, noise, jnp.full(len(latents), time))

    @with_mesh
    def squares(
        params: Params, frozen: Params, batch: Batch, latents: Latents, x_tau: Latents, time: Float[Array, ""]
    ) -> tuple[Int[Array, ""], dict[str, Float[Array, ""]]]:
        """The number of action values, and sums of their squared errors."""
        assert batch.actions is not None and batch.action_mask is not None
        everything, video_time = join_params(params, frozen, vam.config), jnp.full(len(latents), time)
        hidden = vam.hidden_at(everything, vam.condition_on_past(latents, batch.observation), x_tau, video_time)
        noise = vam.draw_noise(key, len(latents))["actions"]
        conditioning = vam.action_conditioning(everything, hidden, video_time, batch.observation)
        planned = vam.decode_actions(everything, conditioning, noise)
        counts = jnp.broadcast_to(batch.action_mask[:, :, None], planned.shape)
        if conditioning.action_dims is not None:
            counts = counts & conditioning.action_dims[:, None]
        error = jnp.where(counts, planned - batch.actions, 0.0)
        sums = {"validation_action_mse": jnp.sum(error**2)}
        if batch.action_scale is not None:
            sums["validation_action_mse_raw"] = jnp.sum((error * batch.action_scale) ** 2)
        return jnp.sum(counts), sums

    def curves(params: Params, frozen: Params, batches: Sequence[Batch]) -> dict[str, float]:
        found: dict[tuple[str, float], list] = {(video, time): [] for video in ("ground_truth", "generated") for time in times}
        for batch in batches:
            latents, noise, path = generate(frozen, batch)
            for time, x_tau in zip(times, path, strict=True):
                true = noised(latents, noise, time)
                found["ground_truth", time].append(squares(params, frozen, batch, latents, true, time))
                found["generated", time].append(squares(params, frozen, batch, latents, x_tau, time))
        values = {}
        for (video, time), parts in jax.device_get(found).items():
            number = max(sum(count for count, _ in parts), 1)
            for name in parts[0][1]:
                values[f"{name}/{video}_video/tau_{time:.4f}"] = float(sum(sums[name] for _, sums in parts) / number)
        return values

    return curves


def make_video_samples(vam: VideoActionModel, mesh: Mesh) -> Callable[[Params, Params, Batch], Videos]:
    """(trained parameters, frozen parameters, batch) → a few of its videos and their predictions, whole in every process.

    Of a batch without videos, those are what the tokenizer makes of its latents.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    of_each = -(-_VIDEOS // shards)  # rows; the first of every shard stay where they are

    def sample(params: Params, frozen: Params, batch: Batch) -> Videos:
        everything = join_params(params, frozen, vam.config)
        few = jax.tree.map(
            lambda x: x.reshape(shards, -1, *x.shape[1:])[:, :of_each].reshape(-1, *x.shape[1:]), batch.observation
        )
        latents = vam.latents(everything, few)
        noise = vam.draw_noise(jax.random.key(vam.config.seed), len(latents))["video"]
        predicted = vam.sample_video(everything, vam.condition_on_past(latents, few), noise)
        return vam.decode_video(everything, latents) if few.video is None else few.video, predicted

    return MeshFunction(jax.jit(sample, out_shardings=NamedSharding(mesh, PartitionSpec())), mesh)


def _show_videos(step: int, videos: Videos, data: DataConfig, writer: MetricWriter) -> None:
    """Real videos on the left, predicted ones on the right; and a few frames, real above predicted ones."""
    real, predicted = (_smaller(stacked(np.asarray(video[:_VIDEOS]))) for video in videos)
    pairs = np.concatenate([real, predicted], axis=3)
    write_video(writer.folder / "samples" / f"{step}.gif", np.concatenate(list(pairs), axis=1), data.video_hz)
    columns = np.linspace(data.past_frames - 1, data.num_frames - 1, _COLUMNS).astype(int)
    writer.write_image(step, "validation_videos", film_strip(real[:, columns], predicted[:, columns]))


def draw_curves(values: dict[str, float]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of what `make_action_curves` found."""
    figure_class = matplotlib_figure()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for path, value in values.items():
        name, video, time = path.split("/")
        curves.setdefault(name, {}).setdefault(video, []).append((float(time.removeprefix("tau_")), value))
    figure = figure_class(figsize=(4 * len(curves), 3), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for video, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=video.replace("_", " "))
        axes.set(title=name.removeprefix("validation_"), xlabel="video flow time τ_v", ylim=(0, None))
        axes.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _smaller(video: UInt8[np.ndarray, "n f h w 3"]) -> UInt8[np.ndarray, "n f y x 3"]:
    """Averages over squares of 2 to 16 pixels, which `data.image_size` are multiples of, to frames of `_SHOWN_SIZE`."""
    n, f, h, w, _ = video.shape
    factor = next((k for k in (1, 2, 4, 8) if min(h, w) <= k * _SHOWN_SIZE), 16)
    return video.reshape(n, f, h // factor, factor, w // factor, factor, 3).mean((3, 5), np.float32).round().astype(np.uint8)
