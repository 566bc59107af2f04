import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mimic_video.config import ConfigError, TrainConfig
from mimic_video.training.optimizer import average_decay, make_optimizer, make_schedule, power_average_exponent

BASE = TrainConfig(steps=1000, warmup_steps=100, learning_rate=2.0, final_fraction=0.2)


def rates(steps, **changes):
    schedule = make_schedule(dataclasses.replace(BASE, **changes))
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_from_a_millionth_of_the_peak(schedule):
    expected = [2e-6, 2 * (1e-6 + (1 - 1e-6) / 4), 2 * (1e-6 + (1 - 1e-6) * 0.99), 2.0]
    np.testing.assert_allclose(rates([0, 25, 99, 100], schedule=schedule), expected, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [  # after 0, 1/4, 1/2 and all of the 900 steps that follow the warm-up
        ("constant", [2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.6, 1.2, 0.4]),
        ("cosine", [2.0, 0.4 + 1.6 * (1 + math.cos(math.pi / 4)) / 2, 1.2, 0.4]),
    ],
)
def test_after_the_warm_up(schedule, values):
    np.testing.assert_allclose(rates([100, 325, 550, 1000], schedule=schedule), values, rtol=1e-4)
    at_once = rates([0, 250, 500, 1000], schedule=schedule, warmup_steps=0)
    np.testing.assert_allclose(at_once, values, rtol=1e-4)


def test_the_published_schedule():  # SPEC 4.4
    schedule = make_schedule(TrainConfig(steps=500_000, warmup_steps=1000, learning_rate=1e-4, schedule="linear"))
    for step in (1000, 14_112, 51_212, 500_000):
        np.testing.assert_allclose(schedule(step), 1e-4 * (0.2 + 0.8 * (500_000 - step) / 499_000), rtol=1e-5)
    for step in (0, 400, 999):
        np.testing.assert_allclose(schedule(step), 1e-4 * (1e-6 + (1 - 1e-6) * step / 1000), rtol=1e-4, atol=1e-11)


def test_adamw_behind_global_clipping():
    config = TrainConfig(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.5, clip_norm=10.0, betas=(0.9, 0.99))
    optimizer = make_optimizer(config)
    params = {"kernel": np.array([[1.0, -2.0]]), "bias": np.array([3.0])}
    gradients = [
        {"kernel": np.array([[30.0, 0.0]]), "bias": np.array([-40.0])},  # norm 50: scaled by 1/5
        {"kernel": np.array([[1.0, 2.0]]), "bias": np.array([0.5])},
    ]
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    m = dict.fromkeys(params, 0.0)
    v = dict.fromkeys(params, 0.0)
    for step, gradient in enumerate(gradients, start=1):
        updates, state = update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, value in gradient.items():
            value = value / 5 if step == 1 else value
            m[name], v[name] = 0.9 * m[name] + 0.1 * value, 0.99 * v[name] + 0.01 * value**2
            adam = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.99**step)) + 1e-8)
            params[name] = params[name] - 0.1 * (adam + 0.5 * params[name])  # the bias decays too
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5)


def test_a_schedule_may_be_longer_than_the_run():
    long, short = (
        make_schedule(TrainConfig(steps=steps, warmup_steps=1000, schedule="linear", schedule_steps=500_000))
        for steps in (500_000, 14_112)
    )
    for step in (10, 1000, 14_112):
        assert short(step) == long(step)


def test_power_function_average():
    assert abs(power_average_exponent(0.1) - 6.9372) < 1e-4  # SPEC 4.4
    for std in (0.05, 0.1, 0.25):  # the deviation of the density (γ+1)·xᵞ on [0, 1]
        gamma = power_average_exponent(std)
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        np.testing.assert_allclose(math.sqrt(square - mean**2), std, rtol=1e-9)
    config = dataclasses.replace(BASE, ema_std=0.1)
    decays = [float(average_decay(config, jnp.asarray(step))) for step in range(400)]
    np.testing.assert_allclose(decays, [(1 - 1 / (n + 1)) ** 7.9372 for n in range(400)], atol=1e-6)
    average = 0.0
    for step, decay in enumerate(decays):
        average = decay * average + (1 - decay) * step
    weights = np.arange(1, 401) ** 7.9372 - np.arange(400) ** 7.9372  # as ∫ tᵞ over each step
    np.testing.assert_allclose(average, np.arange(400) @ weights / weights.sum(), rtol=1e-6)


def test_warmup_stable_decay():
    values = rates([100, 500, 700, 850, 1000], schedule="wsd", decay_steps=300)
    np.testing.assert_allclose(values, [2.0, 2.0, 2.0, 1.2, 0.4], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wsd"}, r"'train\.decay_steps' is 0; expected 1 to 900"),
        ({"schedule": "wsd", "decay_steps": 901}, r"'train\.decay_steps' is 901"),
        ({"decay_steps": 5}, r"'train\.decay_steps' is 5; expected 0, since schedule is not 'wsd'"),
        ({"spike_factor": 0.5}, r"'train\.spike_factor' is 0\.5"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)


def test_a_first_moment_in_bfloat16():
    config = dataclasses.replace(BASE, first_moment="bfloat16")
    state = make_optimizer(config).init({"kernel": jnp.zeros((2, 3))})
    assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.bfloat16
    assert optax.tree.get(state, "nu")["kernel"].dtype == jnp.float32


def norms_that_pass(norms, factor=3.0):
    """Whether each of a row of gradient norms moved the parameters."""
    optimizer = make_optimizer(dataclasses.replace(BASE, warmup_steps=0, spike_factor=factor))
    params = {"kernel": jnp.ones(1)}
    state, moved, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for norm in norms:
        before = state
        updates, state = update({"kernel": jnp.full(1, norm)}, state, params)
        moved.append(bool(updates["kernel"][0] != 0))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before.inner, state.inner)
        assert all(jax.tree.leaves(same)) != moved[-1]
    assert int(state.skipped) == moved.count(False)
    return moved


def test_spikes_are_skipped():
    """The first norm is the average; a spike moves neither parameters nor moments."""
    assert norms_that_pass([1.0, 2.9, 50.0, 1.0, 3.5, 2.0]) == [True, True, False, True, False, True]


def test_gradients_that_have_grown_for_good_are_let_through():
    moved = norms_that_pass([1.0] + [10.0] * 80)
    assert moved[1:50] == [False] * 49 and moved[-1]


def test_a_norm_that_is_no_number_is_not_a_spike():
    """It ends training instead, which `loop.train` does."""
    assert norms_that_pass([1.0, float("nan")]) == [True, True]
