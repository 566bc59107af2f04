"""Weight files: what other libraries write is read, what we write they read, and everything else is refused."""

import codecs
import io
import json
import os
import pickle
import re
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from mimic_video.weights import files
from mimic_video.weights.files import open_tensors, write_pt, write_safetensors
from mimic_video.weights.published import WeightsError

pytestmark = pytest.mark.reference

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "u8": torch.uint8,
    "bool": torch.bool,
}


@pytest.fixture
def state():
    torch.manual_seed(0)
    tensors = {name: (torch.randn(3, 5) * 100).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "five axes": torch.randn(2, 1, 3, 1, 2)}


def assert_same(tensors, state):
    """Bits, shapes and dtypes."""
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        array = np.asarray(tensors[name])
        assert array.shape == tensors[name].shape == tuple(value.shape)
        assert array.dtype == tensors[name].dtype and array.dtype.name == str(value.dtype).removeprefix("torch.")
        assert array.tobytes() == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def arrays(state):
    bits = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}
    return {
        name: value.view(bits[value.dtype][0]).numpy().view(bits[value.dtype][1]) if value.dtype in bits else value.numpy()
        for name, value in state.items()
    }


def refusal(path):
    with pytest.raises(WeightsError) as error:
        for tensor in open_tensors(path).values():
            np.asarray(tensor)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["x.pt", "x.pth"])
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_files_of_pytorch(tmp_path, state, name, archive):
    state["transposed"] = torch.randn(3, 4).t()
    state["part of another"] = torch.randn(6, 2)[2:4]
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=archive)
    assert_same(open_tensors(tmp_path / name), state)


def test_a_mapping_is_renewed_while_it_is_read(tmp_path, state, monkeypatch):
    loads = []
    original = torch.load
    monkeypatch.setattr(files, "_MAPPED_LIMIT", 100)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (loads.append(kwargs["mmap"]), original(*args, **kwargs))[1])
    torch.save(state, tmp_path / "x.pt")
    assert_same(open_tensors(tmp_path / "x.pt"), state)
    assert loads[0] is True and 2 <= len(loads) <= len(state)


def test_counters_of_transformer_engine_are_left_out(tmp_path):
    torch.save({"a": torch.zeros(1), "b._extra_state": io.BytesIO(b"anything"), "_extra_state": None}, tmp_path / "x.pt")
    assert list(open_tensors(tmp_path / "x.pt")) == ["a"]


def test_files_of_safetensors(tmp_path, state):
    safetensors.torch.save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    assert_same(open_tensors(tmp_path / "x.safetensors"), state)


def test_what_we_write_others_read(tmp_path, state):
    write_safetensors(tmp_path / "x.safetensors", arrays(state), arrays(state).items())
    write_pt(tmp_path / "x.pt", arrays(state).items())
    for read in (safetensors.torch.load_file(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.pt", weights_only=True)):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in state.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt", "x.safetensors"]
    header = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_tensors_are_written_as_they_come(tmp_path):
    """The file grows between one tensor and the next, and appears under its name at the end only."""
    path, sizes = tmp_path / "x.safetensors", []

    def tensors():
        for name in "ab":
            yield name, np.ones(2**20, np.float32)
            [partial] = tmp_path.iterdir()
            assert partial != path
            sizes.append(partial.stat().st_size)

    write_safetensors(path, dict.fromkeys("ab", np.empty(2**20, np.float32)), tensors())
    assert 2**22 <= sizes[0] < 2**22 + 1000 and sizes[1] >= 2**23
    assert path.exists()


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", np.zeros((2, 3), np.float32))],
        [("b", np.zeros((2, 3), np.float32)), ("a", np.zeros((2, 3), np.float32))],
        [("a", np.zeros((3, 2), np.float32)), ("b", np.zeros((2, 3), np.float32))],
        [("a", np.zeros((2, 3), np.float16)), ("b", np.zeros((2, 3), np.float32))],
        [(name, np.zeros((2, 3), np.float32)) for name in "abc"],
    ],
)
def test_tensors_that_were_not_announced(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    path.write_text("before")
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(path, dict.fromkeys("ab", np.zeros((2, 3), np.float32)), tensors)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.safetensors", "before")]


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def tensors():
        yield "a", np.zeros(3, np.float32)
        raise KeyboardInterrupt

    for write in (
        lambda: write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(3, np.float32)}, tensors()),
        lambda: write_pt(tmp_path / "x.pt", tensors()),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []


def shards(folder, index=None):
    """Two shards as diffusers writes them."""
    tensors = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.arange(4.0)}
    for number, names in ((1, "ab"), (2, "c")):
        safetensors.torch.save_file({name: tensors[name] for name in names}, folder / f"model-0000{number}-of-00002.safetensors")
    where = {"a": 1, "b": 1, "c": 2} | (index or {})
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for name, number in where.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def test_folders(tmp_path):
    tensors = shards(tmp_path)
    assert_same(open_tensors(tmp_path), tensors)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(codecs.BOM_UTF8 + index.read_bytes())
    assert_same(open_tensors(tmp_path), tensors)
    (tmp_path / "one").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "one" / "model.safetensors")
    assert_same(open_tensors(tmp_path / "one"), tensors)


def test_folders_that_do_not_hold_together(tmp_path):
    assert "no single safetensors file" in refusal(tmp_path)
    shards(tmp_path, {"c": 1, "d": 2})
    message = refusal(tmp_path)
    assert "'c' in model-00001-of-00002" in message and "'d' in model-00002-of-00002" in message
    shards(tmp_path, {"c": 3})
    assert "there is no file" in refusal(tmp_path) and "model-00003" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "is not an index" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "model-00001-of-00002.safetensors, model-00002" in refusal(tmp_path)


# Files that are refused.


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.npz", "x"])
def test_no_file(tmp_path, name):
    assert f"there is no file {tmp_path / name}" in refusal(tmp_path / name)


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK")
    assert "expected .pt, .pth, .safetensors or a folder" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", ["pt", "old pt", "safetensors"])
def test_truncated_files(tmp_path, state, kind):
    path = tmp_path / f"x.{kind.removeprefix('old ')}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pt")
    whole = path.read_bytes()
    for length in (0, 5, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert re.search("truncated|not a PyTorch file", refusal(path))


def test_bytes_behind_a_safetensors_file(tmp_path, state):
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("ab") as file:
        file.write(b"more")
    assert "truncated or damaged" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"hello, this is no header",
        b"[1, 2, 3]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
    ],
)
def test_damaged_safetensors_headers(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert "truncated or damaged" in refusal(tmp_path / "x.safetensors")


def test_a_safetensors_file_of_another_dtype(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    assert "'a' has the dtype 'F8_E4M3'; expected one of F64, F32" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"a text file, renamed" * 9, pickle.dumps(3), pickle.dumps({"a": [1, 2]})])
def test_other_files_with_a_weight_files_name(tmp_path, content):
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)


class Payload:
    """Unpickled by an unsafe reader, this leaves a folder behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_executed(tmp_path):
    torch.save({"a": torch.zeros(2), "b": Payload(tmp_path / "executed")}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"b": Payload(tmp_path / "executed")}, protocol=2))
    for name in ("x.pt", "y.pt"):
        assert "code in a file is not executed" in refusal(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([torch.zeros(2)], "holds a list; expected a state dict"),
        (torch.zeros(2), "holds a Tensor; expected a state dict"),
        ({"model": {"a": torch.zeros(2)}, "iteration": 3}, "'model' is a dict, 'iteration' is a int"),
    ],
)
def test_pytorch_files_that_are_no_state_dicts(tmp_path, value, part):
    torch.save(value, tmp_path / "x.pt")
    assert part in refusal(tmp_path / "x.pt")


def test_pytorch_is_named_when_it_is_missing(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mimic-video-jax\[convert\]'"):
        open_tensors(tmp_path / "x.pt")
