"""Named mixtures of datasets, as plain data, and the shares of samples that their weights come to.

A weight says how often a dataset is gone through relative to the others of a mixture, as in Octo and OpenVLA, where these come
from: with weights of 1 every step of every dataset is seen equally often, so large datasets have large shares.
"""

from collections.abc import Mapping

import numpy as np

from data_pipelines.oxe import registry
from data_pipelines.oxe.spec import nearest

_HYDRA = "stanford_hydra_dataset_converted_externally_to_rlds"
_BUDS = "austin_buds_dataset_converted_externally_to_rlds"
_FRANKA_PLAY = "nyu_franka_play_dataset_converted_externally_to_rlds"
_FURNITURE = "furniture_bench_dataset_converted_externally_to_rlds"
_KITCHEN = "ucsd_kitchen_dataset_converted_externally_to_rlds"
_SAILOR = "austin_sailor_dataset_converted_externally_to_rlds"
_SIRIUS = "austin_sirius_dataset_converted_externally_to_rlds"
_EDAN = "dlr_edan_shared_control_converted_externally_to_rlds"
_PICK_INSERT = "iamlab_cmu_pickup_insert_converted_externally_to_rlds"

_RTX = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_orig": 1.0,
    "taco_play": 2.0,
    "jaco_play": 2.0,
    "berkeley_cable_routing": 3.0,
    "roboturk": 1.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 1.0,
    "toto": 1.0,
}
_SOUP = _RTX | {
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "language_table": 0.1,
    _HYDRA: 2.0,
    _BUDS: 1.0,
    _FRANKA_PLAY: 3.0,
    _FURNITURE: 0.1,
    _KITCHEN: 2.0,
    _SAILOR: 1.0,
    _SIRIUS: 1.0,
    _EDAN: 1.0,
    _PICK_INSERT: 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}
_SOUP_PLUS = _SOUP | {"bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}
_DOOR = "nyu_door_opening_surprising_effectiveness"

MIXTURES: dict[str, dict[str, float]] = {
    "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
    "libero": {f"libero_{suite}_no_noops": 1.0 for suite in ("spatial", "object", "goal", "10")},
    "rtx": _RTX,
    "rtx_franka": _RTX
    | {
        _HYDRA: 1.0,
        _BUDS: 3.0,
        _FRANKA_PLAY: 3.0,
        "maniskill_dataset_converted_externally_to_rlds": 0.1,
        _FURNITURE: 0.1,
        "cmu_franka_exploration_dataset_converted_externally_to_rlds": 5.0,
        _SAILOR: 1.0,
        _SIRIUS: 1.0,
        "berkeley_rpt_converted_externally_to_rlds": 1.0,
        "kaist_nonprehensile_converted_externally_to_rlds": 3.0,
        "stanford_robocook_converted_externally_to_rlds": 1.0,
        _PICK_INSERT: 1.0,
        "utaustin_mutex": 1.0,
        "cmu_play_fusion": 1.0,
    },
    "oxe_magic_soup": _SOUP,
    "oxe_magic_soup_plus": _SOUP_PLUS,
    "oxe_magic_soup_plus_minus": {
        name: weight
        for name, weight in (_SOUP_PLUS | {"fractal20220817_data": 1.0}).items()
        if name not in ("language_table", "droid")
    },
    # Octo's own: they still have the wrist-only dataset and BC-Z. Its bridge_dataset is bridge_orig under another name.
    "octo_rtx": _RTX | {_DOOR: 5.0},
    "octo_magic_soup": _SOUP | {_DOOR: 1.0, "bc_z": 0.2},
}


def find_mixture(name: str) -> dict[str, float]:
    """Weights by dataset of a named mixture. Raises ValueError, naming the most similar one."""
    if name not in MIXTURES:
        raise ValueError(f"no mixture '{name}'{nearest(name, MIXTURES)}")
    return dict(MIXTURES[name])


def check_mixture(weights: Mapping[str, float]) -> None:
    """Raises ValueError with a line for every dataset that is not registered, with the nearest, or has no positive weight."""
    if not weights:
        raise ValueError("a mixture needs at least one dataset")
    known = registry.names()
    problems = [f"  dataset '{name}' is not registered{nearest(name, known)}" for name in weights if name not in known]
    problems += [
        f"  the weight of '{name}' is {weight}; expected a positive number"
        for name, weight in weights.items()
        if not (np.isfinite(weight) and weight > 0)
    ]
    if problems:
        raise ValueError("\n".join(["the mixture cannot be used:", *problems]))


def effective_weights(weights: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Shares of samples: weight × size of each dataset, over the sum of these; they add up to one.

    Args:
        sizes: of the same datasets, in steps.

    Raises:
        ValueError: if a dataset has no size, or one that is not positive.
    """
    for name in weights:
        if not sizes.get(name, 0) > 0:
            raise ValueError(f"the size of dataset '{name}' is {sizes.get(name)}; expected a positive number of steps")
    products = {name: weight * sizes[name] for name, weight in weights.items()}
    total = sum(products.values())
    return {name: product / total for name, product in products.items()}
