"""The error of a user who configures, and what error messages have in common."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration value that cannot be used. The message names the field, the value and what was expected."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like a wrong one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
