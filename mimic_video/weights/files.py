"""Weight files: PyTorch's (`.pt`, `.pth`) and safetensors, read and written tensor by tensor.

Reading keeps at most one tensor, writing at most one tensor of a safetensors file, in memory beyond what the caller holds.
PyTorch itself is imported only where its own format is used (the extra `convert`).
"""

import functools
import io
import json
import math
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mimic_video.atomic import atomically
from mimic_video.weights.published import IGNORED, LazyTensor, WeightsError

_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in _SAFETENSORS.items()}
_MAPPED_LIMIT = 256 * 2**20  # bytes of a memory-mapped file that may become resident


def open_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a `.pt`, `.pth` or `.safetensors` file, or of a folder of safetensors shards with their index, by name.

    Nothing in a file is executed.

    Raises:
        WeightsError: naming the file and what is wrong with it: absent, of another kind, truncated, or holding anything but
            tensors.
        ModuleNotFoundError: if PyTorch is needed and not installed.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return _open_torch(path)
    raise WeightsError(f"{path} is not a weight file; expected .pt, .pth, .safetensors or a folder of .safetensors")


def write_safetensors(path: str | os.PathLike, shapes: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a safetensors file that appears whole or not at all.

    The library itself writes only tensors that are all in memory.

    Args:
        shapes: name → anything with the `shape` and `dtype` that its tensor will have, in the order of `tensors`.
        tensors: (name, array), written and let go one by one.

    Raises:
        ValueError: if `tensors` is not what `shapes` announced.
    """
    header, end = {}, 0
    for name, struct in shapes.items():
        dtype = np.dtype(struct.dtype)
        start, end = end, end + math.prod(struct.shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(struct.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data are aligned
    expected = iter(header.items())
    with atomically(path) as partial, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, array in tensors:
            wanted = next(expected, None)
            found = (name, {"dtype": _SAFETENSORS_NAMES.get(array.dtype), "shape": list(array.shape)})
            if wanted is None or (name, wanted[1] | found[1]) != wanted:
                raise ValueError(f"{path}: tensor {found} where {wanted} was announced")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        left = next(expected, None)
        if left is not None:
            raise ValueError(f"{path}: tensor {left} was announced and did not come")


def write_pt(path: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a PyTorch state dict that appears whole or not at all. It is held in memory meanwhile."""
    torch = _torch()
    state = {}
    for name, array in tensors:
        raw = torch.from_numpy(np.array(array, order="C").reshape(-1).view(np.uint8))
        state[name] = raw.view(getattr(torch, array.dtype.name)).reshape(array.shape)
    with atomically(path) as partial:
        torch.save(state, partial)


def _open_safetensors(path: pathlib.Path) -> dict[str, LazyTensor]:
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                dtype = np.dtype(_SAFETENSORS[entry.get_dtype()])
                tensors[name] = LazyTensor(tuple(entry.get_shape()), dtype, functools.partial(_read_safetensors, path, name))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file, or is truncated or damaged: {error}") from error
    except KeyError as error:
        raise WeightsError(f"{path}: '{name}' has the dtype {error}; expected one of {', '.join(_SAFETENSORS)}") from error
    return tensors


def _read_safetensors(path: pathlib.Path, name: str) -> np.ndarray:
    """One tensor, with the file mapped no longer than that: pages once read stay resident while it is."""
    with safe_open(path, framework="np") as file:
        return file.get_tensor(name)


def _open_folder(folder: pathlib.Path) -> dict[str, LazyTensor]:
    """Shards with their index, or one file without."""
    indices, files = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        try:
            shards = json.loads(indices[0].read_bytes())["weight_map"]
            opened = {shard: open_tensors(folder / shard) for shard in sorted(set(shards.values()))}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{indices[0]} is not an index of safetensors shards: {error!r}") from error
        absent = [f"'{name}' in {shard}" for name, shard in shards.items() if name not in opened[shard]]
        if absent:
            raise WeightsError(f"{indices[0]} names tensors that are not where it says: {', '.join(absent)}")
        return {name: opened[shard][name] for name, shard in shards.items()}
    if not indices and len(files) == 1:
        return _open_safetensors(files[0])
    found = ", ".join(path.name for path in indices + files) or "none"
    raise WeightsError(f"{folder} has no single safetensors file or index of shards: {found}")


# PyTorch's own format: a pickle of the structure beside the tensors' bytes.


def _open_torch(path: pathlib.Path) -> dict[str, LazyTensor]:
    file = _TorchFile(path)
    bad = [f"'{name}' is a {type(value).__name__}" for name, value in file.others.items() if not IGNORED.fullmatch(name)]
    if bad:
        raise WeightsError(f"{path} is not a flat state dict of tensors: {', '.join(bad)}")
    return {
        name: LazyTensor(tuple(tensor.shape), _numpy_dtype(tensor.dtype), functools.partial(file.read, name))
        for name, tensor in file.tensors.items()
    }


class _TorchFile:
    """A PyTorch file, memory-mapped. Pages once read stay resident while it is mapped, so it is mapped anew now and then."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._load()

    def read(self, name: str) -> np.ndarray:
        tensor, torch = self.tensors[name], _torch()
        array = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
        self._resident += array.nbytes
        if self._mapped and self._resident > _MAPPED_LIMIT:
            self._load()
        return array.view(_numpy_dtype(tensor.dtype)).reshape(tuple(tensor.shape))

    def _load(self) -> None:
        torch = _torch()
        self.tensors, self.others, self._resident = dict[str, Any](), dict[str, Any](), 0  # lets go of the old mapping
        self._mapped = zipfile.is_zipfile(self._path)  # files of PyTorch before 1.6 are no archives and cannot be mapped
        try:
            # Transformer Engine keeps its counters in memory files; making one executes nothing.
            with torch.serialization.safe_globals([io.BytesIO]):
                state = torch.load(self._path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError as error:
            reason = re.search(r"[Uu]nsupported [^\n]*?(?= was not| whose module|\n|$)", str(error))
            raise WeightsError(
                f"{self._path} is not a PyTorch file of plain tensors, and code in a file is not executed: "
                f"{reason[0] if reason else 'unreadable pickle'}"
            ) from error
        except Exception as error:  # what reading arbitrary bytes as a pickle can raise has no common base
            raise WeightsError(f"{self._path} is not a PyTorch file, or is truncated: {error!r}") from error
        if not isinstance(state, dict):
            raise WeightsError(f"{self._path} holds a {type(state).__name__}; expected a state dict")
        for name, value in state.items():
            (self.tensors if isinstance(value, torch.Tensor) else self.others)[name] = value


def _numpy_dtype(dtype: Any) -> np.dtype:
    return np.dtype(str(dtype).removeprefix("torch."))


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("PyTorch files need PyTorch: pip install 'mimic-video-jax[convert]'") from error
    return torch
