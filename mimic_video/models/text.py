"""Text encoders: an instruction becomes rows of features, zero-padded to a fixed count (SPEC 2)."""

import hashlib
import re
from typing import Protocol

import numpy as np
from jaxtyping import Float

from mimic_video.config import ConfigError, TextConfig


class TextEncoder(Protocol):
    def __call__(self, instruction: str) -> Float[np.ndarray, "rows width"]:
        """Features of one instruction; rows past its end are zero."""
        ...


class HashTextEncoder:
    """One fixed random row per word: enough to tell a handful of instructions apart, with no weights and no download."""

    def __init__(self, config: TextConfig):
        self._rows, self._width = config.rows, config.width

    def __call__(self, instruction: str) -> Float[np.ndarray, "rows width"]:
        """Raises ConfigError if the instruction has more words than `text.rows`."""
        words = re.findall(r"\w+", instruction.lower())
        if len(words) > self._rows:
            raise ConfigError(f"instruction {instruction!r} has {len(words)} words; text.rows is {self._rows}")
        features = np.zeros((self._rows, self._width), np.float32)
        for row, word in enumerate(words):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            features[row] = np.random.default_rng(seed).standard_normal(self._width)
        return features


def make_text_encoder(config: TextConfig) -> TextEncoder:
    return {"hash": HashTextEncoder}[config.kind](config)
