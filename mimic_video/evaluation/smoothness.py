"""How smoothly robots move."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def mean_squared_jerk(trajectories: Sequence[Float[np.ndarray, "_ d"]], hz: float) -> float:
    """The mean of ‖d³x/dt³‖² over all times of all trajectories, by third differences: m²/s⁶ for metres, sampled at `hz`.

    Raises:
        ValueError: if no trajectory has the four positions that a third difference needs.
    """
    jerks = np.concatenate([np.diff(positions.astype(np.float64), n=3, axis=0) for positions in trajectories]) * hz**3
    if not len(jerks):
        raise ValueError(f"no jerk can be told from trajectories of {[len(positions) for positions in trajectories]} positions")
    return float((jerks**2).sum(-1).mean())
