import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mimic_video.config import MeshConfig
from mimic_video.parallel.sharding import make_mesh
from mimic_video.runs.fingerprints import fingerprints, json_fingerprint

RANDOM = np.random.default_rng(0)
VALUES = RANDOM.standard_normal((8, 96)).astype(np.float32)
TREE = {
    "a": [{"float32": VALUES, "bfloat16": VALUES.astype(jnp.bfloat16)}],
    "int32": RANDOM.integers(-9, 9, (16, 8, 4), np.int32),
    "bool": VALUES[0] > 0,
    "number": np.int32(5),
}


def spell_out(array):
    """The fingerprint, element by element, in Python's integers."""

    def scramble(x):
        x = (x ^ (x >> 16)) * 0x9E3779B1 % 2**32
        x = (x ^ (x >> 15)) * 0x85EBCA77 % 2**32
        return x ^ (x >> 16)

    bits = np.atleast_1d(array).reshape(-1).view(f"u{array.dtype.itemsize}").tolist()
    return sum(scramble(value ^ scramble(position)) for position, value in enumerate(bits)) % 2**32


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, sequence=4)])
def test_fingerprints_are_the_same_on_every_mesh(mesh):
    mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == MeshConfig(data=1) else 8])

    def place(leaf):
        axes = (("fsdp", "data"), "sequence")[: leaf.ndim]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    expected = {
        "a/0/bfloat16": spell_out(TREE["a"][0]["bfloat16"]),
        "a/0/float32": spell_out(VALUES),
        "bool": spell_out(TREE["bool"]),
        "int32": spell_out(TREE["int32"]),
        "number": spell_out(TREE["number"]),
    }
    assert fingerprints(jax.tree.map(place, TREE)) == expected


def changes():
    flat = VALUES.reshape(-1)
    for position in (0, 1, 300, flat.size - 1):
        for bit in range(32):
            changed = flat.copy()
            changed.view(np.uint32)[position] ^= np.uint32(1 << bit)
            yield changed
    for one, other in ((0, 1), (3, 259), (5, 700)):
        changed = flat.copy()
        changed[[one, other]] = changed[[other, one]]
        yield changed
    for length in (1, 16, 500):
        changed = flat.copy()
        changed[100 : 100 + length] = 0
        yield changed
    yield np.roll(flat, 1)
    yield VALUES.reshape(96, 8).T.reshape(-1)


def test_any_change_shows():
    expected = fingerprints([VALUES])["0"]
    every = np.stack([change.reshape(VALUES.shape) for change in changes()])
    found = [fingerprints([change])["0"] for change in every]
    assert len(found) == 4 * 32 + 3 + 3 + 2
    assert expected not in found


@pytest.mark.parametrize("value", [1.0, 1.5, -3.25])
def test_two_elements_that_change_places_show_even_if_only_their_signs_or_exponents_differ(value):
    before = np.zeros(1024, np.float32)
    for other in (-value, 2 * value, value / 256):
        before[[7, 7 + 512]] = value, other
        after = before.copy()
        after[[7, 7 + 512]] = other, value
        assert fingerprints([before]) != fingerprints([after])


def test_a_tree_without_arrays_has_none():
    assert fingerprints({"empty": {}}) == {}


def test_json_has_one_too_whatever_the_order_of_its_keys():
    assert json_fingerprint({"a": 1, "b": [2]}) == json_fingerprint({"b": [2], "a": 1})
    assert json_fingerprint({"a": 1}) != json_fingerprint({"a": 2})
