import pytest

from data_pipelines.oxe import registry
from data_pipelines.oxe.mixtures import MIXTURES, check_mixture, effective_weights, find_mixture


@pytest.mark.parametrize("name", MIXTURES)
def test_named_mixtures_are_of_registered_datasets(name):
    check_mixture(find_mixture(name))


def test_a_name_is_either_a_mixtures_or_a_datasets():
    assert not set(MIXTURES) & set(registry.names())


def test_published_weights():
    soup = find_mixture("oxe_magic_soup")
    assert len(soup) == 23 and soup["jaco_play"] == 1.0 and soup["berkeley_autolab_ur5"] == 2.0 and soup["language_table"] == 0.1
    plus = find_mixture("oxe_magic_soup_plus")
    assert plus == soup | {"bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}
    minus = find_mixture("oxe_magic_soup_plus_minus")
    assert set(plus) - set(minus) == {"language_table", "droid"} and minus["fractal20220817_data"] == 1.0
    assert len(find_mixture("rtx")) == 10 and len(find_mixture("rtx_franka")) == 24 and len(find_mixture("libero")) == 4


def test_a_mixture_found_is_a_copy():
    find_mixture("bridge_rt_1")["kuka"] = 9.0
    assert "kuka" not in find_mixture("bridge_rt_1")


def test_unknown_names_are_all_listed_with_the_nearest():
    with pytest.raises(ValueError) as error:
        check_mixture({"bridge_origin": 1.0, "droid": 0.0, "cuka": float("nan")})
    assert str(error.value).splitlines() == [
        "the mixture cannot be used:",
        "  dataset 'bridge_origin' is not registered; the nearest is 'bridge_orig'",
        "  dataset 'cuka' is not registered; the nearest is 'kuka'",
        "  the weight of 'droid' is 0.0; expected a positive number",
        "  the weight of 'cuka' is nan; expected a positive number",
    ]
    with pytest.raises(ValueError, match="at least one dataset"):
        check_mixture({})
    with pytest.raises(ValueError, match="no mixture 'magic_soup'; the nearest is 'oxe_magic_soup'"):
        find_mixture("magic_soup")


def test_effective_weights_follow_sizes():
    assert effective_weights({"a": 1.0, "b": 2.0}, {"a": 300, "b": 50, "c": 7}) == {"a": 0.75, "b": 0.25}
    with pytest.raises(ValueError, match="size of dataset 'b' is None"):
        effective_weights({"a": 1.0, "b": 2.0}, {"a": 300})
