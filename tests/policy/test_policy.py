import dataclasses

import jax
import numpy as np
import pytest
import tiny

from mimic_video.batch import Observation
from mimic_video.config import ConfigError
from mimic_video.embodiments import Embodiment
from mimic_video.policy import program
from mimic_video.policy.policy import Policy
from mimic_video.policy.strategies import Committed
from mimic_video.runs import checkpoints, directory
from mimic_video.stages import split_params
from mimic_video.training.steps import make_state
from mimic_video.transforms import compute_statistics, resize_images

CONFIG = tiny.experiment()
STATISTICS = {
    "action": compute_statistics(np.random.default_rng(0).normal([5, -3], [0.1, 2.0], (200, 4, 2))),
    "proprio": compute_statistics(np.random.default_rng(1).normal(1.0, 2.0, (200, 1, 3))),
}

ROBOT = Embodiment("arm", 0, STATISTICS, {"action": (), "proprio": ()})


@pytest.fixture(scope="module")
def params():
    return tiny.params(CONFIG)


@pytest.fixture(scope="module")
def policy(params):
    return Policy(CONFIG, params, ROBOT)


def observation(batch=2, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (batch, 5, *tiny.SIZE, 3), np.uint8)
    return images, random.standard_normal((batch, 3)).astype(np.float32), [f"do task {i}" for i in range(batch)]


def test_a_plan_is_a_function_of_observation_seed_and_query(policy, params):
    plan = policy(*observation())
    assert plan.shape == (2, 4, 2) and np.isfinite(plan).all()
    policy(*observation(seed=1), query=5)  # no state is left behind
    np.testing.assert_array_equal(policy(*observation()), plan)
    np.testing.assert_array_equal(policy(*observation(), query=0), plan)
    fresh, other = (Policy(CONFIG, params, ROBOT, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(fresh(*observation()), plan)
    for changed in (policy(*observation(), query=1), other(*observation()), policy(*observation(seed=1))):
        assert np.abs(changed - plan).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("changes", [{"policy": {"stop_step": 2}}, {"compat": {"bfloat16_low_dim": True}}])
def test_one_program_computes_what_its_parts_do(params, changes):
    """The normalisers as NumPy has them, around the model's own sampler with its own noise."""
    config = tiny.experiment(**changes)
    policy, vam = Policy(config, params, ROBOT, seed=3), tiny.model(config)
    images, proprio, instructions = observation()
    text = np.stack([policy.encode_text(instruction) for instruction in instructions])
    normalised = policy.normalizers["proprio"].normalize(proprio[:, None])
    chunk = jax.jit(vam.sample_actions)(params, Observation(text, images[:, None], proprio=normalised), vam.policy_noise(3, 2, 1))
    expected = policy.normalizers["action"].unnormalize(np.asarray(chunk))
    plan = policy(images, proprio, instructions, query=1)
    np.testing.assert_allclose(plan, expected, rtol=2**-7 if "compat" in changes else 1e-6, atol=1e-6)  # one step of its grid


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_program_normalises_to_the_bit(bfloat16):
    random, config = np.random.default_rng(0), tiny.experiment(compat={"bfloat16_low_dim": bfloat16})
    normalizer = ROBOT.normalizers(config)["action"]
    values = random.normal([5, -3], [0.3, 4.0], (1000, 4, 2)).astype(np.float32)
    parts = program.ranges(normalizer)
    there = jax.jit(program.normalize, static_argnums=2)(values, parts, bfloat16)
    np.testing.assert_array_equal(there, normalizer.normalize(values))
    back = jax.jit(program.unnormalize, static_argnums=2)(there, parts, bfloat16)
    np.testing.assert_array_equal(back, normalizer.unnormalize(np.asarray(there)))


def test_samples_share_the_observation_and_differ_in_noise(policy):
    plan, samples = policy(*observation()), policy.sample(*observation(), samples=3)
    assert samples.shape == (2, 3, 4, 2)
    np.testing.assert_allclose(samples[:, 0], plan, rtol=1e-5, atol=1e-5)
    apart = [np.abs(samples[:, i] - samples[:, j]).max(axis=(1, 2)).min() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) > 1e-3
    with pytest.raises(ValueError, match="'samples' is 0; expected 1 or more"):
        policy.sample(*observation(), samples=0)


def test_images_of_any_size_are_resized_as_in_training(policy):
    images, *rest = observation()
    large = np.kron(images, np.ones((1, 1, 3, 2, 1), np.uint8))
    np.testing.assert_array_equal(policy(large, *rest), policy(resize_images(large, tiny.SIZE), *rest))


def test_nothing_is_compiled_after_the_warm_up(params):
    policy = Policy(CONFIG, params, ROBOT)
    assert policy.warm_up(batch=2) > 0
    policy(*observation())
    assert policy._plan._cache_size() == 1


@pytest.mark.parametrize("name", ["images", "proprio", "instructions"])
def test_every_observation_matters_and_only_to_its_own_robot(policy, name):
    plan, changed = policy(*observation()), dict(zip(("images", "proprio", "instructions"), observation(), strict=True))
    other = dict(zip(changed, observation(seed=1), strict=True)) | {"instructions": ["do nothing", "do task 1"]}
    if name != "instructions":
        other[name][1] = changed[name][1]
    difference = np.abs(policy(**(changed | {name: other[name]})) - plan).max(axis=(1, 2))
    assert difference[0] > 1e-5
    np.testing.assert_allclose(difference[1], 0, atol=1e-6)


def test_features_of_many_instructions_are_not_all_kept(policy):
    images, proprio, _ = observation()
    for group in range(40):
        policy(images, proprio, [f"do task {2 * group + row}" for row in range(2)])
    assert len(policy._text) <= 64
    np.testing.assert_array_equal(policy(*observation()), policy(*observation()))


def test_plans_are_in_raw_units(policy, params):
    normalised = Policy(tiny.experiment(data={"normalization": "identity"}), params, ROBOT)
    images, proprio, instructions = observation()
    entry = STATISTICS["proprio"]
    seen = (proprio[:, None] - entry.mean) / entry.std
    expected = normalised(images, seen[:, 0], instructions) * STATISTICS["action"].std + STATISTICS["action"].mean
    np.testing.assert_allclose(policy(images, proprio, instructions), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        (
            "images",
            np.zeros((2, 4, 16, 32, 3), np.uint8),
            r"'images' has shape \(2, 4, 16, 32, 3\); expected \(2, 5, 16, 32, 3\)",
        ),
        ("images", np.zeros((2, 5, 16, 32), np.uint8), r"'images' has shape \(2, 5, 16, 32\); expected \(2, 5, 16, 32, 3\)"),
        ("images", np.zeros((1, 5, 16, 32, 3), np.uint8), r"'images' has shape"),
        ("images", np.zeros((2, 5, 16, 32, 3), np.float32), "'images' has dtype float32; expected uint8"),
        ("proprio", np.zeros((2, 4), np.float32), r"'proprio' has shape \(2, 4\); expected \(2, 3\)"),
        ("proprio", np.zeros((2, 1, 3), np.float32), r"'proprio' has shape \(2, 1, 3\); expected \(2, 3\)"),
    ],
)
def test_a_wrong_argument_is_named(policy, name, value, complaint):
    arguments = dict(zip(("images", "proprio", "instructions"), observation(), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=complaint):
        policy(**arguments)


def test_a_plan_continues_what_is_committed(params):
    """In raw units: two deviations more in what is committed are two more where it is frozen, fewer where it is soft."""
    policy = Policy(tiny.experiment(policy={"action_steps": 10}), params, ROBOT)
    entry = STATISTICS["action"]
    low, high = (np.tile(entry.mean_clamped[:3] + by * entry.std_clamped[:3], (2, 1, 1)) for by in (-1, 1))
    one, other = (policy(*observation(), committed=Committed(wanted, 2)) for wanted in (low, high))
    difference = (other - one) / entry.std_clamped
    np.testing.assert_allclose(difference[:, :2], 2, atol=0.5)
    assert (difference[:, 2] > 0.2).all() and difference[:, 2].mean() < 1.8
    assert np.abs(difference[:, 3]).max() < np.abs(difference[:, 2]).max()  # of which nothing is asked
    np.testing.assert_allclose((one[:, :2] - low[:, :2]) / entry.std_clamped[:2], 0, atol=0.5)


@pytest.mark.parametrize(
    ("committed", "complaint"),
    [
        (Committed(np.zeros((2, 0, 2)), 0), r"'committed' has actions of shape \(2, 0, 2\); expected \(2, 1 to 4, 2\)"),
        (Committed(np.zeros((2, 5, 2)), 0), r"'committed' has actions of shape \(2, 5, 2\)"),
        (Committed(np.zeros((2, 3)), 0), r"'committed' has actions of shape \(2, 3\)"),
        (Committed(np.zeros((1, 3, 2)), 0), r"'committed' has actions of shape \(1, 3, 2\)"),
        (Committed(np.full((2, 3, 2), np.nan), 0), "'committed' has actions that are not finite"),
        (Committed(np.zeros((2, 3, 2)), 4), "delay is 4 and overlap 3"),
    ],
)
def test_commitments_that_cannot_be_kept(policy, committed, complaint):
    with pytest.raises(ValueError, match=complaint):
        policy(*observation(), committed=committed)


def write_run(run, config, params):
    directory.write_config(run, config)
    trained, frozen = split_params(params, config)
    checkpoints.save_frozen(run, frozen)
    state = make_state(config, jax.tree.map(np.zeros_like, trained)).replace(step=np.int32(4), ema=trained)
    with checkpoints.open_checkpoints(run, 1) as manager:
        checkpoints.save(manager, jax.device_put(state), data={})


def test_a_policy_is_loaded_from_a_run(tmp_path, policy, params):
    """It plans as the one in memory: with the moving average, and the run's statistics."""
    write_run(tmp_path, CONFIG, params)
    directory.save_embodiments(tmp_path, {"arm": ROBOT})
    np.testing.assert_allclose(Policy.load(tmp_path)(*observation()), policy(*observation()), rtol=1e-5, atol=1e-6)
    longer = Policy.load(tmp_path, tiny.experiment(policy={"action_steps": 3}))
    assert np.abs(longer(*observation()) - policy(*observation())).max() > 1e-4


def test_a_run_that_is_no_policy(tmp_path):
    with pytest.raises(directory.RunError, match="is not a run directory"):
        Policy.load(tmp_path)
    directory.write_config(tmp_path, tiny.experiment(stage="video"))
    with pytest.raises(directory.RunError, match="stage 'video'; a policy needs stage 'action'"):
        Policy.load(tmp_path)


def test_published_noise_makes_a_plan_a_function_of_the_observation(params):
    config = tiny.experiment(policy={"noise_stream": "numpy"})
    policy = Policy(config, params, ROBOT)
    plan = policy(*observation())
    np.testing.assert_array_equal(policy(*observation(), query=3), plan)
    assert np.abs(policy(*observation(seed=1)) - plan).max() > 1e-3


def test_normalisers_as_configured():
    config = tiny.experiment(compat={"bfloat16_low_dim": True})
    robot = dataclasses.replace(ROBOT, raw_dims={"action": (1,), "proprio": ()})
    action, proprio = (robot.normalizers(config)[key] for key in ("action", "proprio"))
    values = np.full((4, 2), 5.001, np.float32)
    np.testing.assert_array_equal(action.normalize(values)[:, 1], 5.0)  # left as it is, but for its rounding
    assert (np.abs(action.normalize(values)[:, 0]) < 1).all() and proprio.scale.shape == (1, 3)


def test_one_model_for_two_robots(tmp_path, one_device):
    """Of a mixture: each with its own widths, statistics and token."""
    config = tiny.experiment(decoder={"embodiments": 2}, policy={"action_steps": 10})
    narrow = {
        "action": compute_statistics(np.random.default_rng(2).normal(50, 1.0, (200, 4, 1))),
        "proprio": compute_statistics(np.random.default_rng(3).normal(0, 1.0, (200, 1, 2))),
    }
    robots = {"arm": ROBOT, "lift": Embodiment("lift", 1, narrow, {"action": (), "proprio": ()})}
    params = tiny.params(config)
    write_run(tmp_path, config, params)
    directory.save_embodiments(tmp_path, robots)
    arm, lift = (Policy.load(tmp_path, embodiment=name) for name in robots)
    images, proprio, instructions = observation()
    plan = lift(images, proprio[:, :2], instructions)
    assert plan.shape == (2, 4, 1) and 40 < plan.mean() < 60
    led = lift(images, proprio[:, :2], instructions, committed=Committed(plan[:, :2] + 1, 2))
    assert led.shape == (2, 4, 1) and np.abs(led - plan)[:, :2].min() > 0.5
    other_token = Policy(config, params, dataclasses.replace(robots["lift"], index=0))(images, proprio[:, :2], instructions)
    assert np.abs(other_token - plan).max() > 1e-3
    assert arm(images, proprio, instructions).shape == (2, 4, 2)
    with pytest.raises(ValueError, match=r"'proprio' has shape \(2, 3\); expected \(2, 2\)"):
        lift(images, proprio, instructions)
    with pytest.raises(ConfigError, match="the embodiment is None; this model has 'arm', 'lift'"):
        Policy.load(tmp_path)


def test_cameras_by_name():
    config = tiny.experiment(data={"cameras": ("primary", "wrist")})
    params = tiny.params(config)
    both = Policy(config, params, dataclasses.replace(ROBOT, cameras=("primary", "wrist")))
    one, (images, *rest) = Policy(config, params, ROBOT), observation()
    cameras = {"primary": images, "wrist": 255 - images}
    stacked = np.stack([images, 255 - images], axis=1)
    plan = both(cameras, *rest)
    np.testing.assert_array_equal(both(stacked, *rest), plan)
    without = one({"primary": images}, *rest)
    assert np.abs(without - plan).max() > 1e-4
    np.testing.assert_array_equal(one(stacked, *rest), without)  # this robot has no such camera, whatever is there
    with pytest.raises(ValueError, match=r"is of the cameras \['primary'\]; expected \['primary', 'wrist'\]"):
        both({"primary": images}, *rest)
    small = resize_images(images, (8, 16))
    np.testing.assert_array_equal(
        both(cameras | {"wrist": small}, *rest), both(cameras | {"wrist": resize_images(small, tiny.SIZE)}, *rest)
    )
    with pytest.raises(ValueError, match=r"'images' has shapes .* expected one and the same but for height and width"):
        both(cameras | {"wrist": images[:, :4]}, *rest)
    with pytest.raises(ValueError, match=r"'images' has shape .*; expected \(2, 2, 5, 16, 32, 3\)"):
        both(images, *rest)
