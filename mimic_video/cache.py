"""Where things that can be made again are kept on a user's machine."""

import os
import pathlib


def user_cache(what: str) -> pathlib.Path:
    """The folder under `~/.cache`, or the environment's XDG_CACHE_HOME, for `what`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mimic_video" / what
