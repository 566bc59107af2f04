import pytest

from mimic_video.errors import ConfigError
from mimic_video.registry import Registry


@pytest.fixture
def registry():
    return Registry("tokenizer.kind", {"path": "pathlib:Path"})


def test_parts_are_found_by_name_and_by_place(registry):
    import fractions
    import pathlib

    assert registry["path"] is pathlib.Path and registry["fractions:Fraction"] is fractions.Fraction
    registry.register("fraction")(fractions.Fraction)
    assert registry["fraction"] is fractions.Fraction
    registry.register("fraction")(fractions.Fraction)  # a module that is run twice


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("paht", "is 'paht'; expected one of 'path', or 'module:attribute'"),
        ("pathlib:Paht", r"is 'pathlib:Paht'; .*has no attribute 'Paht'"),
        ("nowhere:Path", r"is 'nowhere:Path'; .*No module named 'nowhere'"),
    ],
)
def test_a_name_that_nothing_has(registry, name, complaint):
    with pytest.raises(ConfigError, match=f"config field 'tokenizer.kind' {complaint}"):
        registry[name]


@pytest.mark.parametrize("name", ["path", "my:path"])
def test_names_that_cannot_be_given(registry, name):
    with pytest.raises(ValueError, match=f"tokenizer.kind '{name}' has a colon, or is another part's"):
        registry.register(name)(dict)
