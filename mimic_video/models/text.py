"""Text encoders: an instruction becomes rows of features, zero-padded to a fixed count (SPEC 2)."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float

from mimic_video.atomic import atomically
from mimic_video.config import ConfigError, TextConfig
from mimic_video.models.protocols import TextEncoder
from mimic_video.registry import TEXT_ENCODERS

# What transformers reads from a folder. Of the weights it takes the first that is there; an index names the files it is cut into.
_TOKENIZERS = ("tokenizer.json", "spiece.model")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_SAMPLES, _SAMPLE_BYTES, _END_BYTES = 1024, 4096, 2**20  # what a fingerprint reads of a large file

_HOW_TO_GET = (
    "either copy a cache here that launch/precompute_text.py has filled where the model is, or put the model here "
    "(hf download NAME --exclude '*.h5' for one of Hugging Face)"
)


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 file without byte-order mark, spaces around them and blank ones. Raises ConfigError if it is none."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # `splitlines` would break prompts at signs such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts={path} cannot be read: {error}") from error
    prompts = (line.strip("\ufeff").strip() for line in lines)  # marks also where marked files were put together
    return [prompt for prompt in prompts if prompt]


class HashTextEncoder:
    """One fixed random row per word: enough to tell a handful of instructions apart, with no weights and no download."""

    def __init__(self, config: TextConfig, width: int):
        self._rows, self._width = config.rows, width

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


class T5TextEncoder:
    """The last hidden state of a T5 encoder, kept for every prompt it has seen (SPEC 2); thread-safe.

    A prompt of more than `text.rows` tokens, its end token among them, is cut as in the published system, with a warning when it
    is encoded. Features are kept in `text.cache`, or in memory where that is empty. The model is loaded at the first prompt that
    is not kept, and stays loaded. A cache that has every prompt needs no model on this machine, nor transformers, nor PyTorch.
    Nothing is ever downloaded.

    An entry of the cache that is damaged is encoded again, with a warning; where the model is not here, it is an error.

    Args:
        config: of kind `t5`.
        width: what its features have to have, `backbone.text_width`.
        device: where PyTorch runs the model, e.g. `cuda`.

    Raises:
        ConfigError: naming the field, if `text.model` is neither on this machine nor in the cache, is there several times in the
            cache and cannot be told apart, lacks a file, is no T5, or has another width.
    """

    def __init__(self, config: TextConfig, width: int, device: str = "cpu"):
        self._config, self._width, self._device = config, width, device
        self._folder = _model_folder(config.model)
        if self._folder is not None:
            _check_model(self._folder, config, width)
        elif not config.cache:
            raise ConfigError(
                f"config field 'text.model' is {config.model!r}, which is not on this machine, and text.cache is "
                f"empty; {_HOW_TO_GET}"
            )
        self._kept: FeatureCache | dict[str, np.ndarray] = (
            FeatureCache(_cache_folder(config, self._folder)) if config.cache else {}
        )
        self._encode: Callable[[Sequence[str]], list[np.ndarray]] | None = None
        self._lock = threading.Lock()
        # PyTorch keeps a team of spinning threads for every thread that calls it, and a loader's threads come and go.
        self._torch_thread = ThreadPoolExecutor(1)

    def __call__(self, instruction: str) -> Float[np.ndarray, "rows width"]:
        """float32 features of one instruction; rows past its end token are zero.

        Raises:
            ConfigError: if the instruction is not kept and the model cannot be loaded: it is not on this machine, damaged, or the
                extra `text` is not installed. Also if the cache holds features of another width.
        """
        with self._lock:
            known = self._recall(instruction)
            if known is None:
                self._add([instruction])
                known = self._recall(instruction)
        assert known is not None  # it has just been added
        features = np.zeros((self._config.rows, self._width), np.float32)
        features[: len(known)] = known
        return features

    def __reduce__(self):
        # Worker processes read the cache, or load the model themselves.
        return T5TextEncoder, (self._config, self._width, self._device)

    def kept(self) -> list[str]:
        """The prompts that are kept."""
        return self._kept.prompts() if isinstance(self._kept, FeatureCache) else list(self._kept)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The prompts that are not kept yet, each once, in the order given."""
        return [prompt for prompt in dict.fromkeys(prompts) if self._recall(prompt) is None]

    def add(self, prompts: Sequence[str]) -> None:
        """Encodes one or more prompts in one pass, padded to the longest, and keeps their features. Raises as a call does."""
        with self._lock:
            self._add(prompts)

    def _add(self, prompts: Sequence[str]) -> None:
        if self._encode is None:
            if self._folder is None:
                raise ConfigError(
                    f"instruction {prompts[0]!r} is not in text.cache {self._config.cache!r}, and text.model "
                    f"{self._config.model!r} is not on this machine; {_HOW_TO_GET}"
                )
            self._encode = _load_t5(self._folder, self._config, self._device)
        encoded = self._torch_thread.submit(self._encode, prompts).result()
        try:
            for prompt, features in zip(prompts, encoded, strict=True):
                self._kept[prompt] = features
        except OSError as error:
            raise ConfigError(f"config field 'text.cache' is {self._config.cache!r}, which cannot be written: {error}") from error

    def _recall(self, prompt: str) -> Float[np.ndarray, "n width"] | None:
        try:
            features = self._kept.get(prompt)
        except DamagedEntryError as error:
            if self._folder is None:
                raise ConfigError(f"{error}; copy it here again, since text.model {self._config.model!r} is not") from error
            logging.warning("%s; the prompt is encoded again", error)
            return None
        if features is not None and features.shape[1] != self._width:
            raise ConfigError(
                f"config field 'backbone.text_width' is {self._width}; expected {features.shape[1]}, the width of "
                f"features in text.cache {self._config.cache!r}"
            )
        return features


class DamagedEntryError(ValueError):
    """A file of a `FeatureCache` that cannot be used. The message names it."""


class FeatureCache:
    """Features on disk, one file per prompt: `<words of the prompt>-<hash>.npz` holds `prompt` and `features`, its real rows.

    Several threads and processes may read and write at once: a file appears whole, and the last one written stays.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, prompt: str) -> Float[np.ndarray, "n width"] | None:
        """float32 features, or None if there are none. Raises DamagedEntryError if their file is not as it was written."""
        path = self._path(prompt)
        try:
            with np.load(path) as entry:
                stored, features = entry["prompt"].item(), entry["features"]
        except FileNotFoundError:
            return None
        except Exception as error:  # of zipfile, zlib or numpy, by where the damage is
            raise DamagedEntryError(f"{path}, features of the prompt {prompt!r}, cannot be read: {error}") from error
        if stored != prompt or features.dtype != np.float32 or features.ndim != 2:
            raise DamagedEntryError(
                f"{path} holds {features.dtype} {features.shape} for the prompt {stored!r}; expected float32 rows for {prompt!r}"
            )
        return features

    def __setitem__(self, prompt: str, features: Float[np.ndarray, "n width"]) -> None:
        path = self._path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as partial, partial.open("wb") as file:
            np.savez(file, prompt=np.array(prompt), features=np.asarray(features, np.float32))

    def prompts(self) -> list[str]:
        """All that there are features of. Raises DamagedEntryError for a file that cannot be read."""
        prompts = []
        for path in sorted(self._folder.glob("*.npz")):
            try:
                with np.load(path) as entry:
                    prompts.append(entry["prompt"].item())
            except Exception as error:  # of zipfile, zlib or numpy, by where the damage is
                raise DamagedEntryError(f"{path} cannot be read: {error}") from error
        return prompts

    def _path(self, prompt: str) -> Path:
        words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
        return self._folder / f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:16]}.npz"


def fingerprint(folder: Path) -> str:
    """16 hex digits that tell T5 models apart by what is in their files, wherever these are, and without reading all of them.

    Covers the configuration and the tokenizer whole. Of weights it covers names, sizes, the first and last megabyte (headers and
    checksums) and evenly spaced samples: no change is missed that is a 1024th of a file long.

    Raises:
        ConfigError: naming the file that the folder lacks.
    """
    digest = hashlib.sha256()
    for path in _model_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= 2 * _END_BYTES + _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(_END_BYTES))
            for sample in range(_SAMPLES):
                file.seek(sample * size // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
            file.seek(size - _END_BYTES)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _model_files(folder: Path) -> list[Path]:
    """Every file that the model is made of."""

    def present(names: Sequence[str]) -> list[Path]:
        return [folder / name for name in names if (folder / name).is_file()]

    config, tokenizers, weights = present(["config.json"]), present(_TOKENIZERS), present(_WEIGHTS)[:1]
    for what, found in (("config.json", config), (" or ".join(_TOKENIZERS), tokenizers), (" or ".join(_WEIGHTS), weights)):
        if not found:
            raise ConfigError(f"text.model {folder} has no {what}; expected the folder of a T5 model and its tokenizer")
    if weights[0].suffix == ".json":
        shards = sorted(set(_read_json(weights[0])["weight_map"].values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise ConfigError(f"text.model {folder} has no {', '.join(absent)}, which its {weights[0].name} names")
        weights += present(shards)
    return config + tokenizers + present(_TOKENIZER_EXTRAS) + weights


def _model_folder(model: str) -> Path | None:
    """Where `text.model` is on this machine; a name is looked up among what Hugging Face's tools have downloaded."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        folder = Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):  # no such name, or not downloaded
        return None
    return folder if any((folder / name).is_file() for name in _WEIGHTS) else None  # others ask for its configuration only


def _check_model(folder: Path, config: TextConfig, width: int) -> None:
    _model_files(folder)
    values = _read_json(folder / "config.json")
    if values.get("model_type") != "t5":
        raise ConfigError(
            f"config field 'text.model' is {config.model!r}, a model of type {values.get('model_type')!r}; expected 't5'"
        )
    if values["d_model"] != width:
        raise ConfigError(
            f"config field 'backbone.text_width' is {width}; expected {values['d_model']}, that of text.model {config.model!r}"
        )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} of text.model cannot be read: {error}") from error


def _cache_folder(config: TextConfig, model: Path | None) -> Path:
    """Where `text.cache` has the features of the model; of the only model of that name if it is not on this machine.

    All that features depend on is in the folder's name: `rows` because a prompt may have been cut.
    """
    name = f"{Path(config.model).name}-{config.precision}-{config.rows}rows"
    root = Path(config.cache)
    found = sorted(path for path in root.glob("*") if re.fullmatch(re.escape(name) + "-[0-9a-f]{16}", path.name))
    if model is not None:
        own = root / f"{name}-{fingerprint(model)}"
        if found and own not in found:
            logging.warning(
                "text.cache %s has features of another model than text.model %s, which are not used: %s",
                root,
                model,
                ", ".join(path.name for path in found),
            )
        return own
    if not found:
        raise ConfigError(
            f"config field 'text.model' is {config.model!r}, which is not on this machine, and text.cache "
            f"{config.cache!r} has no folder {name}-*; {_HOW_TO_GET}"
        )
    if len(found) > 1:
        raise ConfigError(
            f"config field 'text.model' is {config.model!r}, which is not on this machine to tell which features "
            f"in text.cache {config.cache!r} are its own; keep one of {', '.join(path.name for path in found)}"
        )
    return found[0]


def _load_t5(folder: Path, config: TextConfig, device: str) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """A function of prompts that gives their features, each float32 (tokens, width)."""
    try:
        import torch
        from transformers import T5EncoderModel, T5TokenizerFast
    except ImportError as error:
        raise ConfigError(
            f"config field 'text.kind' is 't5', whose model needs the extra 'text' ({error}): pip install 'mimic-video-jax[text]'"
        ) from error
    try:
        tokenizer = T5TokenizerFast.from_pretrained(folder)
        model, report = T5EncoderModel.from_pretrained(folder, dtype=getattr(torch, config.precision), output_loading_info=True)
        model.to(device)
    except Exception as error:  # undocumented: files that are damaged or do not fit, memory, an unknown device
        raise ConfigError(f"text.model {folder} cannot be loaded on {device!r}: {error}") from error
    if report["missing_keys"]:  # transformers makes them up
        raise ConfigError(f"text.model {folder} has no weights for {', '.join(sorted(report['missing_keys']))}")

    def encode(prompts: Sequence[str]) -> list[np.ndarray]:
        prompts = list(prompts)
        for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
            if len(ids) > config.rows:
                logging.warning("text.rows is %d; cut from %d tokens: %r", config.rows, len(ids), prompt)
        # Padding to the longest prompt is enough: padded tokens are masked, and T5's positions are relative.
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=config.rows, return_tensors="pt").to(device)
        with torch.inference_mode():
            hidden = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        hidden, lengths = hidden.float().cpu().numpy(), tokens.attention_mask.sum(1).tolist()
        return [rows[:length].copy() for rows, length in zip(hidden, lengths, strict=True)]

    return encode


def make_text_encoder(config: TextConfig, width: int) -> TextEncoder:
    """The encoder that `text.kind` names, of features as wide as the backbone reads them (`backbone.text_width`).

    Raises:
        ConfigError: if its model or cache cannot be used.
    """
    return TEXT_ENCODERS[config.kind](config, width)
