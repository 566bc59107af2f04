"""What recorded actions and states say of each other, without a model."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

_LAGS = 8  # steps by which a state may come after its command, and a quarter of it before
_OTHERS = 6  # episodes, one less of which each is compared with


@dataclasses.dataclass(frozen=True)
class Recording:
    """The numbers of an episode of n steps, in raw units.

    Attributes:
        targets: the first action of each of its k windows, as windows have it: of poses relative to the current one.
    """

    actions: Float[np.ndarray, "n m"]
    proprio: Float[np.ndarray, "n p"]
    targets: Float[np.ndarray, "k m"]


@dataclasses.dataclass(frozen=True)
class Response:
    """How states answer actions, dimension by dimension, in episodes that did not choose where to look.

    Attributes:
        proprio_dim: of each action dimension the one of proprioception that goes with it most.
        change: whether the action goes with the change of that state rather than with the state itself.
        lag: steps after which the state goes with the action most.
        matched: correlation with the episode's own states at that lag; NaN where one of the two does not change.
        others: with the states of other episodes, their mean.
        never_before: with its own states, at the best lag that is not negative.
    """

    proprio_dim: Int[np.ndarray, " m"]
    change: Bool[np.ndarray, " m"]
    lag: Int[np.ndarray, " m"]
    matched: Float[np.ndarray, "e m"]
    others: Float[np.ndarray, "e m"]
    never_before: Float[np.ndarray, "e m"]


def response(recordings: Sequence[Recording]) -> Response:
    """Correlations of at least two recordings.

    Lags and dimensions are chosen on every second recording, correlations are of the others: chance does not choose itself.
    """
    lags = np.arange(-_LAGS // 4, _LAGS + 1)
    # In any order: neighbours may have been recorded alike, or in turns.
    recordings = [recordings[place] for place in np.random.default_rng(0).permutation(len(recordings))]
    own = np.stack([_correlations(each, each, lags) for each in recordings])
    count = len(recordings)
    other = np.stack(
        [
            _mean(np.stack([_correlations(each, recordings[(place + k) % count], lags) for k in range(1, min(_OTHERS, count))]))
            for place, each in enumerate(recordings)
        ]
    )
    chosen, tested = slice(0, None, 2), slice(1, None, 2)
    pooled = _mean(own[chosen])  # (kind, lag, m, p)
    strength = np.abs(pooled)
    actions = own.shape[3]
    margins = _error(own[chosen])
    best = [_nearest_lag(strength[:, :, i], margins[:, :, i], lags) for i in range(actions)]
    kind, lag, dim = np.array(best).T
    every = np.arange(actions)
    later = np.array([strength[kind[i], lags >= 0, i, dim[i]].argmax() for i in every]) + int((lags < 0).sum())
    return Response(
        proprio_dim=dim,
        change=kind == 1,
        lag=lags[lag],
        matched=own[tested][:, kind, lag, every, dim],
        others=other[tested][:, kind, lag, every, dim],
        never_before=own[tested][:, kind, later, every, dim],
    )


def _nearest_lag(strength: np.ndarray, margins: np.ndarray, lags: np.ndarray) -> tuple[int, int, int]:
    """Where the correlation is strongest, or as strong up to its standard error at a lag nearer to none: slopes are long."""
    kind, best, dim = np.unravel_index(strength.argmax(), strength.shape)
    as_good = strength[kind, :, dim] >= strength[kind, best, dim] - margins[kind, best, dim]
    return int(kind), int(np.where(as_good, np.abs(lags), np.inf).argmin()), int(dim)


def _error(correlations: np.ndarray) -> np.ndarray:
    """Standard errors of `_mean`."""
    count = np.maximum(np.isfinite(correlations).sum(0), 1)
    squares = np.where(np.isfinite(correlations), (correlations - _mean(correlations)) ** 2, 0).sum(0)
    return np.sqrt(squares) / count


def _mean(correlations: np.ndarray) -> np.ndarray:
    """Over episodes in which there is something to correlate; 0 where there is none."""
    there = np.isfinite(correlations)
    return np.where(there, correlations, 0).sum(0) / np.maximum(there.sum(0), 1)


def _correlations(commanded: Recording, answered: Recording, lags: np.ndarray) -> Float[np.ndarray, "2 l m p"]:
    """Of actions with states, and with their changes in the next step, this many steps later; NaN where one is constant."""
    length = min(len(commanded.actions), len(answered.proprio))
    actions, proprio = commanded.actions[:length], answered.proprio[:length]
    found = np.full((2, len(lags), actions.shape[1], proprio.shape[1]), np.nan)
    for kind, states in enumerate((proprio, np.diff(proprio, axis=0))):
        for place, lag in enumerate(lags):
            first, last = max(0, -lag), min(length, len(states) - lag)
            if last - first >= 3:
                found[kind, place] = _correlation(actions[first:last], states[first + lag : last + lag])
    return found


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    parts = []
    for values in (one.astype(np.float64), other.astype(np.float64)):
        centred = values - values.mean(0)
        size = np.sqrt((centred**2).sum(0))
        still = size <= 1e-5 * np.sqrt(len(values)) * np.maximum(np.abs(values).max(0), 1)  # rounding of float32
        parts.append(np.where(still, np.nan, centred / np.where(still, 1, size)))
    return parts[0].T @ parts[1]
