import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mimic_video.flow.inpainting import prefix_weights
from mimic_video.models.action_decoder import ActionDecoder
from mimic_video.models.protocols import VideoInputs
from mimic_video.models.video_dit import VideoDiT
from mimic_video.vam import Conditioning, Prefix, VideoActionModel

KEY = jax.random.key(7)
CLEAN = 1e-4 / 1.0001  # flow time of conditioned frames
VIDEO, ACTION = tiny.experiment(stage="video"), tiny.experiment()


@pytest.fixture(scope="module")
def params():
    return tiny.params(ACTION)


class Recording(VideoActionModel):
    """Answers `answer` instead of running the networks, and keeps what they were asked. Not to be compiled."""

    def __init__(self, config, answer=0.0):
        super().__init__(config)
        self.answer, self.asked = answer, []

    def _velocity(self, params, inputs):
        self.asked.append(inputs)
        return jnp.broadcast_to(self.answer, inputs.latents.shape)

    def _action_velocity(self, decoder, x_tau, time, conditioning, dropped=None):
        return jnp.broadcast_to(self.answer, x_tau.shape) * (1.0 if dropped is None else 1.0 - dropped[:, None, None])


@functools.cache
def compiled(config, name):
    return jax.jit(getattr(tiny.model(config), name))


def loss_of(vam, params, batch):
    """Loss and metrics of a batch with the draws of `KEY`."""
    return vam.loss(params, batch, vam.draw(KEY, len(batch.frame_mask)))


def noise_of(asked, latents):
    """The noise in a recorded input, solved from x_τ = (1−τ)x₀ + τε; meaningless where frames were given clean."""
    time = np.asarray(asked.times)[:, None, :, None, None, None]
    return (np.asarray(asked.latents) - (1 - time) * latents) / time


@pytest.mark.parametrize("part", [VideoActionModel, VideoDiT, ActionDecoder])
def test_no_method_takes_more_than_five_arguments(part):
    methods = {name: method for name, method in vars(part).items() if inspect.isfunction(method) and not name.startswith("_")}
    methods |= {"__call__": part.__call__} if "__call__" in vars(part) else {}
    counts = {name: len(inspect.signature(method).parameters) - 1 for name, method in methods.items()}  # but self
    assert counts and max(counts.values()) <= 5, counts


# Video loss.


def test_shapes_are_those_of_what_init_makes():
    assert tiny.model(ACTION).shapes == tiny.shapes(ACTION)


def test_conditioned_frames_are_given_clean_and_the_others_noised(params):
    vam, batch = Recording(VIDEO), tiny.batch(VIDEO, 64)
    loss_of(vam, params, batch)
    latents, asked = np.asarray(vam.encode_video(params, batch.observation.video)), vam.asked[0]
    mask, inputs, times = (np.asarray(part) for part in (asked.condition_mask, asked.latents[:, 0], asked.times))
    assert {tuple(row) for row in mask} == {(1, 0, 0), (1, 1, 0)}  # one or two observed latent frames
    assert 16 < (mask[:, 1] == 1).sum() < 48
    np.testing.assert_array_equal(inputs[mask == 1], latents[:, 0][mask == 1])
    np.testing.assert_allclose(times[mask == 1], CLEAN, rtol=1e-5)
    generated = noise_of(asked, latents)[:, 0, 2]
    np.testing.assert_allclose([generated.mean(), generated.std()], [0, 1], atol=0.05)
    assert np.all(times[:, 2:] > CLEAN) and len(np.unique(times[:, 2])) == 64  # a time of its own for every sample
    one = mask[:, 1] == 0
    np.testing.assert_array_equal(times[one, 1], times[one, 2])  # shared by its frames


def test_video_loss_by_hand(params):
    vam, batch = Recording(VIDEO, answer=0.5), tiny.batch(VIDEO, 6)
    batch.frame_mask[0, 6] = batch.frame_mask[3, 5:] = False  # one frame of a group spoils the latent
    loss, metrics = loss_of(vam, params, batch)
    latents, asked = np.asarray(vam.encode_video(params, batch.observation.video)), vam.asked[0]
    counts = 1 - np.asarray(asked.condition_mask)
    counts[[0, 3], 2] = 0
    error = ((0.5 - (noise_of(asked, latents) - latents)) ** 2).mean((1, 3, 4, 5))
    expected = error[counts == 1].mean()
    np.testing.assert_allclose(metrics["video_mse"].value, expected, rtol=1e-3)
    np.testing.assert_allclose(loss, 100 * expected, rtol=1e-3)


@pytest.mark.parametrize("average_generated_only", [True, False])
def test_conditioned_and_padded_frames_have_no_part_in_the_video_loss(params, average_generated_only):
    config = tiny.experiment(stage="video", train={"average_generated_only": average_generated_only})
    batch = tiny.batch(config, 6)
    batch.frame_mask[1, 8] = batch.frame_mask[2, 5:] = False
    vam = Recording(config)

    def loss(answer):
        vam.answer = answer
        return loss_of(vam, params, batch)[0]

    gradient = np.abs(jax.grad(loss)(jnp.zeros((6, 1, 3, 2, 4, 16)))).max((1, 3, 4, 5))
    counts = 1 - np.asarray(vam.asked[0].condition_mask)
    counts[[1, 2], 2] = 0
    np.testing.assert_array_equal(gradient > 0, counts == 1)


def test_the_pixels_of_padded_frames_are_no_target(params):
    vam, batch = Recording(VIDEO), tiny.batch(VIDEO, 4)
    batch.frame_mask[1, 6:] = False
    changed = tiny.changed(batch, video=batch.observation.video.copy())
    changed.observation.video[1, :, 6:] = 255 - changed.observation.video[1, :, 6:]
    np.testing.assert_array_equal(loss_of(vam, params, batch)[0], loss_of(vam, params, changed)[0])
    changed.observation.video[0, :, 6:] = 255 - changed.observation.video[0, :, 6:]
    assert loss_of(vam, params, batch)[0] != loss_of(vam, params, changed)[0]


def test_the_published_weighting_keeps_conditioned_frames_in_the_denominator(params):
    batch = tiny.batch(VIDEO, 6)
    batch.frame_mask[2, 5:] = False
    vam = Recording(VIDEO)
    loss, metrics = loss_of(vam, params, batch)
    published = Recording(tiny.experiment(stage="video", train={"average_generated_only": False}))
    published_loss, published_metrics = loss_of(published, params, batch)
    valid = np.ones((6, 3))
    valid[2, 2] = 0
    share = (valid * (1 - np.asarray(vam.asked[0].condition_mask))).sum() / valid.sum()
    assert 0.2 < share < 0.7
    np.testing.assert_allclose(published_loss / loss, share, rtol=1e-5)
    np.testing.assert_allclose(metrics["video_mse"].value, published_metrics["video_mse"].value, rtol=1e-6)


# Action loss.


def test_padded_actions_have_no_part_in_the_action_loss(params):
    vam, batch = Recording(tiny.experiment(decoder={"proprio_dropout": 0.0})), tiny.batch(ACTION, 4)
    batch.action_mask[1, 2:] = False
    batch.action_mask[3] = False

    def loss(answer):
        vam.answer = answer
        return loss_of(vam, params, batch)[0]

    gradient = np.abs(jax.grad(loss)(jnp.zeros((4, 4, 2)))).max(-1)
    np.testing.assert_array_equal(gradient > 0, batch.action_mask)
    changed = batch._replace(actions=np.where(batch.action_mask[..., None], batch.actions, 9.0).astype(np.float32))
    np.testing.assert_array_equal(loss(jnp.zeros(())), loss_of(vam, params, changed)[0])
    changed.actions[0, 0] += 1
    assert loss(jnp.zeros(())) != loss_of(vam, params, changed)[0]


def test_action_loss_of_known_actions(params):
    """With x₀ = 3 and the answer 0, the error is (ε − 3)², whose mean is 1 + 9."""
    batch = tiny.batch(ACTION, 2)._replace(actions=np.full((2, 4, 2), 3, np.float32))
    config = tiny.experiment(train={"action_draws": 500})
    loss, metrics = loss_of(Recording(config), params, batch)
    np.testing.assert_allclose(metrics["action_mse"].value, 10, rtol=0.05)
    np.testing.assert_allclose(loss, 10 * metrics["action_mse"].value, rtol=1e-6)


@pytest.mark.parametrize("several", [False, True], ids=["one robot", "robots and views"])
def test_draws_that_share_a_pass_are_as_many_losses(several):
    """The loss and its gradient are the means over the draws one by one."""
    changes = {"decoder": {"embodiments": 2, "proprio_dropout": 0.5}, **VIEWS} if several else {}
    three, one = (tiny.experiment(train={"action_draws": draws}, **changes) for draws in (3, 1))
    params, batch = tiny.params(three), tiny.batch(three, 4)
    batch.action_mask[1, 2:] = False
    if several:
        batch = tiny.changed(
            batch,
            embodiment=np.array([0, 1, 1, 0]),
            view_mask=np.array([[True, True], [True, False]] * 2),
            action_dims=np.array([[True, True], [True, False]] * 2),
        )
    draws = tiny.model(three).draw(KEY, 4)

    def each(config):
        return jax.jit(
            jax.value_and_grad(lambda decoder, draws: tiny.model(config).loss(params | {"decoder": decoder}, batch, draws)[0])
        )

    together = each(three)(params["decoder"], draws)
    shared, alone = {"video_time", "video"}, each(one)
    single = [
        alone(params["decoder"], {name: x if name in shared else x[:, i : i + 1] for name, x in draws.items()}) for i in range(3)
    ]
    mean = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *single)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), together, mean)


def test_proprioception_is_dropped_as_often_as_configured(params):
    """The recording model answers 0 for dropped samples and 10 for the others: errors of 1 and 101."""
    config = tiny.experiment(train={"action_draws": 500}, decoder={"proprio_dropout": 0.25})
    batch = tiny.batch(config, 4)._replace(actions=np.zeros((4, 4, 2), np.float32))
    error = loss_of(Recording(config, answer=10.0), params, batch)[1]["action_mse"].value
    np.testing.assert_allclose((error - 1) / 100, 0.75, atol=0.04)


def test_the_backbone_sees_the_true_video_noised_behind_the_observed_frames(params):
    vam, batch, seen = VideoActionModel(ACTION), tiny.batch(ACTION, 32), {}

    def hidden(params, conditioning, x_tau, time):
        seen.update(past=conditioning.past, x_tau=x_tau)
        return jnp.zeros((len(x_tau), 6, 16))

    vam.hidden_at = hidden
    draws = vam.draw(KEY, 32)
    vam.hidden_of_noised_video(params, batch, draws)
    time = draws["video_time"]
    latents = np.asarray(vam.encode_video(params, batch.observation.video))
    np.testing.assert_array_equal(seen["past"], latents[:, :, :2])
    scale = np.asarray(time)[:, None, None, None, None, None]
    noise = (np.asarray(seen["x_tau"]) - (1 - scale) * latents) / scale
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
    assert len(np.unique(time)) == 32


def test_the_observed_frames_reach_the_backbone_clean(params):
    """Whatever was added to them, and however noisy the rest is."""
    batch = tiny.batch(ACTION, 2)
    vam = tiny.model(ACTION)
    clean = vam.encode_video(params, batch.observation.video)
    noise = jax.random.normal(KEY, clean.shape)
    hidden = jax.jit(lambda params, clean, *rest: vam.hidden_at(params, Conditioning(clean[:, :, :2], text), *rest))
    time, text = jnp.asarray([0.3, 0.9]), jnp.asarray(batch.observation.text)
    reference = hidden(params, clean, noise, time)
    assert reference.shape == (2, 3 * 2, 16)
    np.testing.assert_array_equal(hidden(params, clean, noise.at[:, :, :2].set(7.0), time), reference)
    assert np.abs(hidden(params, clean, noise.at[:, :, 2].add(1.0), time) - reference).max() > 1e-3
    assert np.abs(hidden(params, clean.at[:, :, 1].add(1.0), noise, time) - reference).max() > 1e-3


def test_gradients_reach_only_what_a_stage_trains(params):
    batch, dropping = tiny.batch(ACTION, 8), tiny.experiment(decoder={"proprio_dropout": 0.5})
    for config, trained in ((VIDEO, "backbone"), (dropping, "decoder")):
        gradients = jax.jit(jax.grad(lambda params, vam: loss_of(vam, params, batch)[0]), static_argnums=1)(
            params, tiny.model(config)
        )
        for part in ("tokenizer", "backbone", "decoder"):
            leaves = jax.tree_util.tree_leaves_with_path(gradients[part])
            sizes = {jax.tree_util.keystr(path, simple=True): float(np.abs(leaf).max()) for path, leaf in leaves}
            if part == trained:
                assert [path for path, size in sizes.items() if size == 0] == []
            else:
                assert set(sizes.values()) == {0.0}


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("action", "actions", np.zeros((2, 4, 3), np.float32)),
        ("action", "proprio", np.zeros((2, 2, 3), np.float32)),
        ("action", "action_mask", np.ones((2, 4), np.float32)),
        ("video", "frame_mask", np.ones((2, 3), bool)),
        ("video", "text", np.zeros((2, 4, 9), np.float32)),
    ],
)
def test_a_batch_of_other_shapes_is_refused(params, stage, name, value):
    """Of which some would be broadcast, or a mask multiplied as numbers."""
    config = tiny.experiment(stage=stage)
    with pytest.raises(AssertionError, match=f"field '{name}' of the batch"):
        loss_of(tiny.model(config), params, tiny.changed(tiny.batch(config, 2), **{name: value}))


# Sampling.


def observed(batch, **fields):
    """A batch's observation of the past frames, with other fields."""
    return tiny.changed(batch, video=batch.observation.video[:, :, :5], **fields).observation


def hidden_of(config, params, batch, drawn):
    """Hidden states where the policy stops, and τ_v there."""
    conditioning = compiled(config, "condition")(params, observed(batch))
    return compiled(config, "sample_hidden")(params, conditioning, drawn["video"])


def noise(key=KEY, size=2):
    return tiny.model(ACTION).draw_noise(key, size)


def test_stop_step_zero_is_one_partial_pass_on_pure_noise(params):
    assert ACTION.policy.stop_step == 0
    vam, batch = VideoActionModel(ACTION), tiny.batch(ACTION, 2)
    blocks = jax.tree.map(lambda leaf: np.concatenate([leaf[:1], np.full_like(leaf[1:], np.nan)]), params["backbone"]["blocks"])
    partial = params | {"backbone": params["backbone"] | {"blocks": blocks}}
    hidden, time = hidden_of(ACTION, partial, batch, noise())
    np.testing.assert_allclose(time, 80 / 81, rtol=1e-6)
    past = np.asarray(vam.condition(params, observed(batch)).past)
    generated = 80 / 81 * np.asarray(noise()["video"])[:, :, 2:]  # unit noise, as the network sees σ = 80
    inputs = np.concatenate([past, generated], axis=2)
    times = np.float32([[CLEAN, CLEAN, 80 / 81]] * 2)
    backbone = vam.module("backbone", params)
    mask = np.float32([[1, 1, 0]] * 2)
    expected = backbone.hidden(VideoInputs(*map(jnp.asarray, (inputs, times, batch.observation.text, mask))), stop=1)
    np.testing.assert_allclose(hidden, expected.reshape(2, 6, 16), atol=1e-5)


def test_stop_step_one_is_an_euler_step_away(params):
    vam, batch, seen = Recording(tiny.experiment(policy={"stop_step": 1}), answer=0.5), tiny.batch(ACTION, 2), {}
    vam.hidden_at = lambda params, conditioning, x_tau, time: seen.update(x_tau=x_tau) or x_tau.reshape(len(x_tau), -1, 16)
    _, time = vam.sample_hidden(params, vam.condition(params, observed(batch)), noise()["video"])
    sigma = (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 3) ** 7  # the second of three steps
    np.testing.assert_allclose(time, sigma / (1 + sigma), rtol=1e-6)
    start = np.asarray(noise()["video"], np.float64)[:, 0, 2]
    x0 = 80 / 81 * start - 80 / 81 * 0.5
    x = sigma / 80 * (80 * start) + (1 - sigma / 80) * x0
    np.testing.assert_allclose(seen["x_tau"][:, 0, 2], x / (1 + sigma), atol=1e-4)


@pytest.mark.parametrize("stop", [2, 3])
def test_later_stops_run(params, stop):
    config, batch = tiny.experiment(policy={"stop_step": stop}), tiny.batch(ACTION, 2)
    hidden, time = hidden_of(config, params, batch, noise())
    assert np.isfinite(hidden).all()
    if stop == config.policy.video_steps:
        np.testing.assert_allclose(time, 0.002 / 1.002, rtol=1e-5)
    other = hidden_of(ACTION, params, batch, noise())[0]
    assert np.abs(hidden - other).max() > 1e-3


def sample(params, batch, key=KEY, config=ACTION):
    return np.asarray(compiled(config, "sample_actions")(params, observed(batch), noise(key, len(batch.actions))))


def test_actions_are_a_function_of_the_noise(params):
    batch = tiny.batch(ACTION, 3)
    actions = sample(params, batch)
    assert actions.shape == (3, 4, 2) and actions.dtype == np.float32 and np.isfinite(actions).all()
    np.testing.assert_array_equal(sample(params, batch), actions)
    assert np.abs(sample(params, batch, jax.random.key(8)) - actions).min() > 1e-3


def test_robots_of_a_batch_do_not_influence_each_other(params):
    batch, other = tiny.batch(ACTION, 3), tiny.batch(ACTION, 3, seed=1)
    mixed = jax.tree.map(lambda one, two: np.concatenate([one[:1], two[1:]]), batch, other)
    actions, with_others = sample(params, batch), sample(params, mixed)
    np.testing.assert_allclose(with_others[0], actions[0], atol=1e-6)
    assert np.abs(with_others[1:] - actions[1:]).max(axis=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("name", ["video", "proprio", "text"])
def test_every_observation_matters_to_the_actions(params, name):
    batch = tiny.batch(ACTION, 2)
    changed = tiny.changed(batch, **{name: getattr(tiny.batch(ACTION, 2, seed=1).observation, name)})
    assert np.abs(sample(params, changed) - sample(params, batch)).max(axis=(1, 2)).min() > 1e-5


def test_euler_steps_of_the_action_flow(params):
    """An answer of 2 at every one of the steps leads from the noise to the noise less 2."""
    vam = Recording(ACTION, answer=2.0)
    told = vam.action_conditioning(params, jnp.zeros((2, 6, 16)), jnp.full(2, 0.5), tiny.batch(ACTION, 2).observation)
    actions = vam.decode_actions(params, told, noise()["actions"])
    np.testing.assert_allclose(actions, noise()["actions"] - 2, atol=1e-5)


def test_a_sampled_video_continues_the_observed_frames(params):
    vam, conditioning = tiny.model(VIDEO), compiled(VIDEO, "condition")(params, observed(tiny.batch(VIDEO, 2)))
    video = np.asarray(compiled(VIDEO, "sample_video")(params, conditioning, noise()["video"]))
    assert video.shape == (2, 1, 9, *tiny.SIZE, 3) and video.dtype == np.uint8
    np.testing.assert_array_equal(video[:, :, :5], vam.decode_video(params, conditioning.past))
    again = compiled(VIDEO, "sample_video")(params, conditioning, noise(jax.random.key(8))["video"])
    assert (video[:, :, 5:] != again[:, :, 5:]).mean() > 0.5


def test_a_video_takes_every_step_and_a_final_clean_pass(params):
    vam, batch = Recording(VIDEO), tiny.batch(VIDEO, 2)
    with jax.disable_jit():
        vam.sample_video(params, vam.condition(params, observed(batch)), noise()["video"])
    sigmas = [(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)]
    times = [[CLEAN, CLEAN, sigma / (1 + sigma)] for sigma in sigmas]
    np.testing.assert_allclose([asked.times[1] for asked in vam.asked], times, rtol=1e-5)


def test_pixels_survive_the_whole_8_bit_range(params):
    """A basis of unit vectors makes the tokenizer's first sixteen pixel values of a frame come back exactly."""
    vam = VideoActionModel(VIDEO)
    tokenizer = {name: dict(part) for name, part in params["tokenizer"].items()}
    tokenizer["first"]["basis"] = np.eye(192, 16, dtype=np.float32)
    video = np.zeros((1, 1, 1, 8, 8, 3), np.uint8)
    video.reshape(-1)[:16] = np.linspace(0, 255, 16)
    decoded = np.asarray(vam.decode_video({"tokenizer": tokenizer}, vam.encode_video({"tokenizer": tokenizer}, video)))
    np.testing.assert_array_equal(decoded.reshape(-1)[:16], video.reshape(-1)[:16])


def test_a_stop_time_on_the_grid_is_that_stop_step(params):
    sigma = (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 3) ** 7
    batch = tiny.batch(ACTION, 2)
    results = [
        hidden_of(tiny.experiment(policy=policy), params, batch, noise())
        for policy in ({"stop_step": 1}, {"stop_time": sigma / (1 + sigma)})
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)


def test_stop_time_one_reads_the_noise_itself(params):
    vam, batch, seen = Recording(tiny.experiment(policy={"stop_time": 1.0})), tiny.batch(ACTION, 2), {}
    vam.hidden_at = lambda params, conditioning, x_tau, time: seen.update(x_tau=x_tau) or x_tau.reshape(len(x_tau), -1, 16)
    _, time = vam.sample_hidden(params, vam.condition(params, observed(batch)), noise()["video"])
    np.testing.assert_array_equal(time, 1.0)
    np.testing.assert_array_equal(seen["x_tau"], noise()["video"])


def test_guidance_moves_away_from_the_negative_prompt(params):
    """Estimates are linear in velocities: with a velocity that answers the text, x̂₀ + g·(x̂₀ − x̂₀(negative))."""

    class TextVelocity(Recording):
        def _velocity(self, params, inputs):
            return super()._velocity(params, inputs) + inputs.text.mean(axis=(1, 2))[:, None, None, None, None, None]

    batch, positive, negative = tiny.batch(VIDEO, 2), np.full((2, 4, 8), 0.5, np.float32), np.full((2, 4, 8), 0.2, np.float32)
    vam = TextVelocity(VIDEO)
    seen = observed(batch, text=positive)
    x, past = 80 * noise()["video"], vam.condition(params, seen).past
    estimates = {g: vam._denoiser(params, vam.condition(params, seen, negative, g), 3)(x, jnp.float32(80.0)) for g in (0.0, 2.0)}
    np.testing.assert_array_equal(estimates[2.0][:, :, :2], past)
    difference = (estimates[2.0] - estimates[0.0])[:, :, 2]
    np.testing.assert_allclose(difference, -80 / 81 * 2.0 * 0.3, atol=1e-5)
    videos = [
        compiled(VIDEO, "sample_video")(params, tiny.model(VIDEO).condition(params, observed(batch), *guided), noise()["video"])
        for guided in ((), (batch.observation.text[::-1], 3.0))
    ]
    assert (videos[0] != videos[1])[:, :, 5:].mean() > 0.05


def test_windows_of_other_lengths_and_sizes(params):
    video = np.random.default_rng(0).integers(0, 256, (1, 1, 1, 32, 16, 3), np.uint8)
    seen = observed(tiny.batch(VIDEO, 1))._replace(video=video)
    start = np.random.default_rng(1).standard_normal((1, 1, 4, 4, 2, 16)).astype(np.float32)
    sampled = compiled(VIDEO, "sample_video")(params, compiled(VIDEO, "condition")(params, seen), start)
    assert sampled.shape == (1, 1, 13, 32, 16, 3)


@pytest.mark.training
def test_the_wan_tokenizer_in_place_of_the_fitted_one():
    config = tiny.experiment(stage="video", tokenizer={"kind": "wan", "width": 4}, precision="bfloat16")
    vam, batch, params = tiny.model(config), tiny.batch(config, 1), tiny.params(config)
    latents = jax.jit(vam.encode_video)(params, batch.observation.video)
    assert latents.shape == (1, 1, 3, 2, 4, 16) and latents.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(latents.astype(jnp.bfloat16), np.float32), latents)  # as computed
    assert np.isfinite(jax.jit(functools.partial(loss_of, vam))(params, batch)[0])
    conditioning = jax.jit(vam.condition)(params, observed(batch))
    video = jax.jit(vam.sample_video)(params, conditioning, noise(size=1)["video"])
    assert video.shape == (1, 1, 9, *tiny.SIZE, 3) and video.dtype == np.uint8


def test_published_noise_has_one_stream_a_part():
    drawn = tiny.model(tiny.experiment(policy={"noise_stream": "numpy"})).policy_noise(0, 2, query=5)
    assert {name: part.shape for name, part in drawn.items()} == {name: part.shape for name, part in noise().items()}
    np.testing.assert_allclose(drawn["video"][0, 0, 0, 0, 0, 0], 1.76405, atol=5e-6)
    np.testing.assert_allclose(drawn["actions"][0, 0], [1.76405, 0.40016], atol=5e-6)


def test_dimensions_that_a_robot_lacks_take_no_part(params):
    batch = tiny.changed(tiny.batch(ACTION, 2), action_dims=np.array([[True, True], [True, False]]))
    gradient = np.abs(
        jax.jit(jax.grad(lambda actions: loss_of(tiny.model(ACTION), params, batch._replace(actions=actions))[0]))(batch.actions)
    )
    assert gradient[0].min() > 0 and gradient[1, :, 0].min() > 0
    full = tiny.batch(ACTION, 2)
    everything = tiny.changed(full, action_dims=np.ones((2, 2), bool))
    loss = jax.jit(functools.partial(loss_of, tiny.model(ACTION)))
    np.testing.assert_allclose(loss(params, everything)[0], loss(params, full)[0], rtol=1e-6)
    assert abs(loss(params, batch)[0] - loss(params, full)[0]) > 1e-3


def test_dimensions_that_a_robot_lacks_stay_at_zero(params):
    batch, dims = tiny.batch(ACTION, 2), np.array([[True, True], [True, False]])
    plan = jax.jit(lambda drawn, dims: tiny.model(ACTION).sample_actions(params, observed(batch, action_dims=dims), drawn))
    actions = plan(noise(), dims)
    np.testing.assert_array_equal(actions[1, :, 1], 0)
    assert np.abs(actions[0]).min() > 0 and np.abs(actions[1, :, 0]).min() > 0
    other = noise() | {"actions": noise()["actions"].at[1, :, 1].set(9.0)}  # nothing in them matters
    np.testing.assert_array_equal(plan(other, dims), actions)
    np.testing.assert_allclose(plan(noise(), dims | True), sample(params, batch), atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sampled_actions_continue_a_prefix(params, precision):
    """Each robot of a batch its own; without weight there is none, and dimensions that a robot lacks stay at zero."""
    config = tiny.experiment(precision=precision, policy={"action_steps": 4})
    vam, batch = tiny.model(config), tiny.batch(config, 3)
    seen = observed(batch, action_dims=jnp.asarray([[True, True], [True, True], [True, False]]))
    hidden = jax.random.normal(KEY, (3, 3 * 2, config.backbone.width))
    conditioning = compiled(config, "action_conditioning")(params, hidden, jnp.ones(3), seen)
    inputs = (params, conditioning, vam.draw_noise(KEY, 3)["actions"])
    target = jnp.asarray([[[1.0, -1.0]] * 4, [[0.0, 0.0]] * 4, [[2.0, 0.0]] * 4])
    weights = jnp.asarray([prefix_weights(4, 2, 3), np.zeros(4), prefix_weights(4, 2, 3)])
    sample = compiled(config, "decode_actions")
    free, led = np.asarray(sample(*inputs)), np.asarray(sample(*inputs, Prefix(target, weights)))
    assert np.abs(led - target)[[0, 2], :2].max() < 0.3 < np.abs(free - target)[[0, 2], :2].max()
    np.testing.assert_allclose(led[1], free[1], atol=1e-5 if precision == "float32" else 0.05)
    assert not led[2, :, 1].any() and np.isfinite(led).all()


def test_chunks_that_share_a_context_are_as_many_plans(params):
    """Each with its own noise; what they continue, and what a robot lacks, is their sample's."""
    vam, batch = tiny.model(ACTION), tiny.batch(ACTION, 2)
    hidden, time = jax.random.normal(KEY, (2, 6, 16)), jnp.asarray([1.0, 0.5])
    noise, seen = jax.random.normal(KEY, (6, 4, 2)), observed(batch, action_dims=jnp.asarray([[True, True], [True, False]]))
    prefix = Prefix(jax.random.normal(KEY, (2, 4, 2)), jnp.tile(prefix_weights(4, 2, 3), (2, 1)))
    told, decode = vam.action_conditioning(params, hidden, time, seen), compiled(ACTION, "decode_actions")
    together = decode(params, told, noise, prefix)
    for draw in range(3):
        alone = decode(params, told, noise[draw::3], prefix)
        np.testing.assert_allclose(together[draw::3], alone, atol=1e-5)


def test_robots_are_told_apart():
    config = tiny.experiment(decoder={"embodiments": 3})
    params, batch = tiny.params(config), tiny.changed(tiny.batch(config, 2), embodiment=np.array([0, 2]))
    loss = functools.partial(loss_of, tiny.model(config))
    both = jax.jit(loss)
    assert abs(both(params, batch)[0] - both(params, tiny.changed(batch, embodiment=np.array([1, 1])))[0]) > 1e-4
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch)[0]))(params)
    moved = np.abs(gradient["decoder"]["embodiment_tokens"]).max(axis=1)
    assert moved[0] > 0 and moved[1] == 0 and moved[2] > 0
    plan = jax.jit(tiny.model(config).sample_actions)
    one, two = (plan(params, observed(batch, embodiment=np.array([0, robot])), noise()) for robot in (1, 2))
    np.testing.assert_array_equal(one[0], two[0])
    assert one.shape == (2, 4, 2) and np.abs(one[1] - two[1]).max() > 1e-4
    with pytest.raises(ValueError, match="embodiment is missing; this decoder has 3 embodiments"):
        tiny.model(config).sample_actions(params, observed(batch, embodiment=None), noise())
    with pytest.raises(ValueError, match="embodiment is given; this decoder has 0 embodiments"):
        tiny.model(ACTION).sample_actions(tiny.params(ACTION), observed(batch), noise())


def test_padding_counts_in_the_loss_if_asked_to(params):
    batch = tiny.batch(ACTION, 2)
    padded = batch._replace(action_mask=batch.action_mask & (np.arange(4) < 2), frame_mask=batch.frame_mask & False)
    for stage in ("video", "action"):
        config = tiny.experiment(stage=stage, train={"mask_padding": False})
        loss = jax.jit(functools.partial(loss_of, tiny.model(config)))
        losses = [loss(params, values)[0] for values in (batch, padded)]
        assert losses[0] == losses[1]


# Precision.


def test_compat_switches_change_what_they_name(params):
    """Each on its own, by little; none of them anything else."""
    batch, exact = tiny.batch(ACTION, 2), sample(params, tiny.batch(ACTION, 2))
    for name in ("bfloat16_rope", "bfloat16_times", "bfloat16_action_state"):
        config = tiny.experiment(compat={name: True})
        assert 0 < np.abs(sample(params, batch, config=config) - exact).max() < 0.05, name
    for name in ("bfloat16_low_dim", "bfloat16_latent_statistics"):  # of the normaliser, of another tokenizer
        np.testing.assert_array_equal(sample(params, batch, config=tiny.experiment(compat={name: True})), exact)


def test_a_context_computed_once_is_the_naive_decoding(params):
    """SPEC 6.2: keys and values for all Euler steps at once, or anew at each of them."""
    vam, batch = tiny.model(ACTION), tiny.batch(ACTION, 2)
    hidden, time = hidden_of(ACTION, params, batch, noise())
    decoder, x = vam.module("decoder", params), noise()["actions"]

    def step(x, at):
        return vam._action_velocity(decoder, x, at, vam.action_conditioning(params, hidden, time, observed(batch)))

    step = jax.jit(step)
    for at in (1.0, 0.5):
        x = x - step(x, jnp.full(2, at)) / 2
    told = vam.action_conditioning(params, hidden, time, observed(batch))
    np.testing.assert_allclose(vam.decode_actions(params, told, noise()["actions"]), x, atol=1e-5)


def test_bfloat16_stays_close_to_float32(params):
    batch = tiny.batch(ACTION, 8)
    for stage in ("video", "action"):
        configs = [tiny.experiment(stage=stage, precision=precision) for precision in ("float32", "bfloat16")]
        exact, rounded = (jax.jit(functools.partial(loss_of, tiny.model(config)))(params, batch)[0] for config in configs)
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, exact, rtol=0.01)
    rounded = sample(params, batch, config=tiny.experiment(precision="bfloat16"))
    assert 0 < np.abs(rounded - sample(params, batch)).max() < 0.05  # of actions with unit variance


# Several cameras.

VIEWS = {"data": {"cameras": ("primary", "wrist")}}


@pytest.fixture(scope="module")
def two_views():
    """Experiment, parameters with a view embedding that is not zero, and a batch whose second sample lacks the second view."""
    config = tiny.experiment(**VIEWS)
    params, batch = tiny.params(config), tiny.batch(config, 2)
    params["backbone"]["view_embedding"] = np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)
    return config, params, tiny.changed(batch, view_mask=np.array([[True, True], [True, False]]))


def test_views_are_coded_by_themselves(two_views):
    config, params, batch = two_views
    both, one = tiny.model(config), tiny.model(ACTION)
    video = batch.observation.video
    latents = both.encode_video(params, video)
    assert latents.shape == (2, 2, *config.latent_shape)
    # Of the batch size that views are coded in, without which the last bits may differ.
    alone = one.encode_video(params, video.reshape(4, 1, *video.shape[2:]))
    np.testing.assert_array_equal(latents.reshape(alone.shape), alone)
    np.testing.assert_array_equal(
        both.decode_video(params, latents).reshape(4, 1, *video.shape[2:]), one.decode_video(params, alone)
    )


@pytest.mark.parametrize("stage", ["video", "action"])
@pytest.mark.parametrize("average_generated_only", [True, False])
def test_what_a_missing_view_would_show_has_no_part_in_a_loss(two_views, stage, average_generated_only):
    config, params, batch = two_views
    config = tiny.experiment(stage=stage, train={"average_generated_only": average_generated_only}, **VIEWS)
    loss = jax.jit(lambda batch: loss_of(tiny.model(config), params, batch)[0])
    for sample, view, matters in ((1, 1, False), (1, 0, True), (0, 1, True)):
        video = batch.observation.video.copy()
        video[sample, view] = 99
        change = abs(loss(tiny.changed(batch, video=video)) - loss(batch))
        assert change > 1e-4 if matters else change == 0


def test_plans_do_not_see_a_missing_view(two_views):
    config, params, batch = two_views
    vam = tiny.model(config)
    seen, other = observed(batch), observed(batch)
    other = other._replace(video=other.video.copy())
    other.video[:, 1] = 99
    plan = jax.jit(lambda seen: vam.sample_actions(params, seen, vam.draw_noise(KEY, 2)))
    difference = np.abs(plan(other) - plan(seen)).max((1, 2))
    assert difference[0] > 1e-4 and difference[1] == 0
