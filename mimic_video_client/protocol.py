"""The wire format of policy servers: msgpack with NumPy arrays, as openpi's, decoded with limits.

An array is a map of b"__ndarray__": True, b"data", b"dtype" and b"shape"; a NumPy scalar one of b"__npgeneric__": True, b"data"
and b"dtype". Arrays of text are read as strings, or lists of them. Nothing that arrives is executed or trusted: no pickle, no
object arrays, and every size is checked against the bytes that are there.

A connection starts with the server's metadata. Then every message of the client, a map in a binary frame, is answered by one
frame, in order: a binary one holds the answer, a text one "kind: what is wrong", after which the connection goes on.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 32 * 2**20  # of a server, unless it is told otherwise

# Kinds of error.
BAD_REQUEST = "bad_request"  # the message is not one, or a field of it is not what the policy needs
EXPIRED = "expired"  # the deadline passed before the policy was free
OVERLOADED = "overloaded"  # the queue is full
DRAINING = "draining"  # the server is shutting down
INTERNAL = "internal"  # the policy failed
ERROR_KINDS = (BAD_REQUEST, EXPIRED, OVERLOADED, DRAINING, INTERNAL)

DTYPES = frozenset({"|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"})
_MAX_DEPTH = 8  # maps and lists within each other
_MAX_ITEMS = 10_000  # in all lists and maps of a message: arrays are for numbers
_MAX_DIMENSIONS = 8
_TEXT = re.compile(r"<U[1-9]\d{0,3}")  # dtypes of text
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"


class ProtocolError(ValueError):
    """Bytes that are no message, or a value that cannot be one."""


def pack(value: Any) -> bytes:
    """A message as bytes: maps, lists, strings, numbers and NumPy arrays. Raises ProtocolError, by the field, for others."""
    try:
        return msgpack.packb(value, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        for name, entry in value.items() if isinstance(value, Mapping) else ():
            try:
                pack(entry)
            except ProtocolError as inner:
                raise ProtocolError(f"field '{name}': {inner}") from error
        raise ProtocolError(f"this value cannot be sent: {error}") from error


def unpack(data: bytes) -> dict[Any, Any]:
    """The message in `data`, a map with strings as keys; arrays in it are copies, and may be written to.

    Raises:
        ProtocolError: if `data` is not msgpack, or holds anything but maps, lists, strings, bytes, numbers and arrays of `DTYPES`
            whose size is that of their bytes; or if it is nested too deeply, or has too many items.
    """
    items = 0

    def count(container: Any) -> Any:
        nonlocal items
        items += len(container)
        if items > _MAX_ITEMS:
            raise ProtocolError(f"the message has more than {_MAX_ITEMS} items in maps and lists; send numbers as arrays")
        return container

    try:
        value = msgpack.unpackb(
            data,
            object_hook=lambda fields: _decode(count(fields)),
            list_hook=count,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except Exception as error:  # msgpack has no class of its own for all that can be wrong
        raise ProtocolError(f"the message is not valid msgpack: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"the message is a {type(value).__name__}; expected a map")
    _check(value, "", _MAX_DEPTH)
    return value


def error_text(kind: str, message: str) -> str:
    """The text frame of an error."""
    return f"{kind}: {message}"


def parse_error(text: str) -> tuple[str, str]:
    """(kind, message) of a text frame; one of another server's is INTERNAL, in one line."""
    kind, separator, message = text.partition(": ")
    return (kind, message) if separator and kind in ERROR_KINDS else (INTERNAL, " ".join(text.split()))


def _encode(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic) or isinstance(value, np.ma.MaskedArray):  # its mask would be lost
        shown = f"{repr(value)[:80]!r} is a {type(value).__name__}"
        raise TypeError(f"{shown}; expected a map, list, string, number of 64 bits or NumPy array")
    if value.dtype.kind == "U":
        return value.tolist()
    little = value.dtype.newbyteorder("<").str if value.dtype.kind in "buif" else value.dtype.str
    if little not in DTYPES:
        raise TypeError(f"an array of dtype {value.dtype}; expected one of {', '.join(sorted(DTYPES))}")
    if isinstance(value, np.generic):
        return {_SCALAR: True, b"data": value.item(), b"dtype": little}
    return {_ARRAY: True, b"data": value.astype(little, copy=False).tobytes(), b"dtype": little, b"shape": value.shape}


def _decode(fields: dict[Any, Any]) -> Any:
    if _ARRAY in fields:
        return _decode_array(*_tagged(fields, _ARRAY, "data", "dtype", "shape"))
    if _SCALAR in fields:
        data, dtype = _tagged(fields, _SCALAR, "data", "dtype")
        if isinstance(data, bool | int | float):
            return _dtype(dtype).type(data)
        raise ProtocolError(f"the data of a NumPy scalar are a {type(data).__name__}; expected a number")
    return fields


def _tagged(fields: dict[Any, Any], tag: bytes, *names: str) -> list[Any]:
    expected = {tag, *(name.encode() for name in names)}
    if set(fields) != expected:
        raise ProtocolError(f"an array has the fields {list(fields)}; expected {sorted(expected)}")
    return [fields[name.encode()] for name in names]


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ProtocolError(f"an array has dtype {name!r}; expected one of {', '.join(sorted(DTYPES))}")
    return np.dtype(name)


def _decode_array(data: Any, dtype_name: Any, shape: Any) -> np.ndarray | str | list[Any]:
    text = isinstance(dtype_name, str) and _TEXT.fullmatch(dtype_name)
    dtype = np.dtype(dtype_name) if text else _dtype(dtype_name)
    if not isinstance(data, bytes):
        raise ProtocolError(f"the data of an array are a {type(data).__name__}; expected bytes")
    sizes = list(shape) if isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS else None
    if sizes is None or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise ProtocolError(f"an array has shape {str(shape)[:80]}; expected at most {_MAX_DIMENSIONS} sizes of zero or more")
    expected = dtype.itemsize
    for size in sizes:
        expected *= size
    if len(data) != expected:
        raise ProtocolError(f"an array of shape {sizes} and dtype {dtype_name} comes with {len(data)} bytes; expected {expected}")
    if dtype.kind == "b":
        return np.frombuffer(data, np.uint8).reshape(sizes) != 0
    array = np.frombuffer(bytearray(data), dtype).reshape(sizes)
    if not text:
        return array
    if array.size > _MAX_ITEMS:
        raise ProtocolError(f"an array of text has {array.size} entries; expected at most {_MAX_ITEMS}")
    data.decode("utf-32-le")  # raises for what is no text, such as half of a surrogate pair
    return array.tolist()


def _check(value: Any, path: str, depth: int) -> None:
    """Refuses what a message has no use for, at the place where it is."""
    if isinstance(value, Mapping | list) and depth == 0:
        raise ProtocolError(f"the message is nested more than {_MAX_DEPTH} deep at '{path[:80]}'")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ProtocolError(f"the message has the key {str(key)[:80]!r} in '{path[:80]}'; expected strings as keys")
            _check(entry, f"{path}.{key}" if path else key, depth - 1)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _check(entry, f"{path}[{index}]", depth - 1)
    elif not (value is None or isinstance(value, bool | int | float | str | bytes | np.ndarray | np.generic)):
        raise ProtocolError(f"the message has a {type(value).__name__} at '{path[:80]}'")
