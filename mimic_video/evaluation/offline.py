"""What a model gets right on held-out recordings, without a simulator."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from mimic_video.transforms import Normalizer

# One sample of the data pipeline in raw units: video, frame_mask, instruction, proprio, actions, action_mask.
Window = dict[str, Any]


def action_errors(
    plan: Callable[..., np.ndarray], windows: Sequence[Window], past_frames: int, normalizer: Normalizer, batch_size: int = 32
) -> dict[str, Any]:
    """Open-loop error of planned chunks against the recorded actions.

    Args:
        plan: a `Policy`, or anything called like one.
        windows: at least one window with actions.
        normalizer: of the actions; errors are root mean squares in its units, where 1 is one standard deviation.

    Returns:
        `rmse` over all real (not padded) actions; `rmse_per_step` along the chunk, of the steps that are real in some window;
        `first_step_rmse`; `windows`, their count; and `example`, the recorded and planned first actions of each window in order,
        (n, m), raw units.

    Raises:
        ValueError: if no action is real.
    """
    planned = planned_chunks(plan, windows, past_frames, batch_size)
    recorded = np.stack([window["actions"] for window in windows])
    mask = np.stack([window["action_mask"] for window in windows])
    if not mask.any():
        raise ValueError(f"'action_mask' of {len(windows)} windows is False throughout; expected a real action to compare with")
    squares = ((planned - recorded) * normalizer.scale) ** 2
    squares, counts = squares.mean(-1), mask.sum(0)
    per_step = np.sqrt((squares * mask).sum(0)[counts > 0] / counts[counts > 0])
    return {
        "rmse": float(np.sqrt(squares[mask].mean())),
        "first_step_rmse": float(per_step[0]),
        "rmse_per_step": per_step.tolist(),
        "windows": len(windows),
        "example": {"recorded": recorded[:, 0].tolist(), "planned": planned[:, 0].tolist()},
    }


def planned_chunks(
    plan: Callable[..., np.ndarray], windows: Sequence[Window], past_frames: int, batch_size: int = 32
) -> Float[np.ndarray, "n *s a m"]:
    """The chunks that `plan`, a `Policy` or its `sample`, makes of the windows, in raw units.

    Noise is a function of a window's place alone: windows that differ in one input show what that input does.
    """
    chunks = []
    for query, places in enumerate(full_batches(len(windows), batch_size)):
        group = [windows[place] for place in places]
        chunks.append(
            plan(
                np.stack([window["video"][:, :past_frames] for window in group]),
                np.stack([window["proprio"][-1] for window in group]),
                [window["instruction"] for window in group],
                query=query,
            )
        )
    return np.concatenate(chunks)[: len(windows)]


def full_batches(count: int, size: int) -> list[list[int]]:
    """0 … count − 1 in batches of that size; the last number fills up the last one, since one size compiles once."""
    return [[min(place, count - 1) for place in range(first, first + size)] for first in range(0, count, size)]


def psnr(
    predicted: UInt8[np.ndarray, "n f h w 3"], real: UInt8[np.ndarray, "n f h w 3"], mask: Bool[np.ndarray, "n f"]
) -> Float[np.ndarray, " g"]:
    """Peak signal-to-noise ratio in dB of the frame indices that are real in some window, over the windows whose frame is."""
    squares = ((predicted.astype(np.float32) - real.astype(np.float32)) / 255) ** 2
    counts = mask.sum(0)
    mse = (squares.mean(axis=(2, 3, 4)) * mask).sum(0)[counts > 0] / counts[counts > 0]
    return -10 * np.log10(np.maximum(mse, 1e-10))
