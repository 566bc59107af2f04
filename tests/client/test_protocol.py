import msgpack
import numpy as np
import pytest

from mimic_video_client.protocol import ProtocolError, error_text, pack, parse_error, unpack

# msgpack_numpy.packb({"x": np.arange(3, dtype=np.float32), "n": np.int64(5)}) of openpi-client 0.1.2
OPENPI = bytes.fromhex(
    "82a17884c40b5f5f6e6461727261795f5fc3c40464617461c40c000000000000803f00000040c4056474797065a33c6634c40573686170659103"
    "a16e83c40d5f5f6e7067656e657269635f5fc3c4046461746105c4056474797065a33c6938"
)


def array_fields(**changes):
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    return {"x": {name.encode(): value for name, value in fields.items() if value is not ...}}


@pytest.mark.parametrize("dtype", ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ">i4", ">f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_arrays_come_back_as_they_were(dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    back = unpack(pack({"x": array}))["x"]
    np.testing.assert_array_equal(back, array)
    assert back.shape == shape and back.dtype == array.dtype.newbyteorder("<")


def test_other_values_come_back_as_they_were():
    message = {"text": "öffne die Schublade", "list": [1, 2.5, None, True, b"raw"], "map": {"a": {"b": np.float32(1.5)}}}
    assert unpack(pack(message)) == message
    turned = np.arange(12, dtype=np.uint8).reshape(3, 4).T
    back = unpack(pack({"x": turned}))["x"]
    np.testing.assert_array_equal(back, turned)
    assert back.flags.writeable


def test_arrays_of_text_are_strings():
    """As openpi's clients pack them; ours sends strings itself."""
    text = np.array("öffne die Schublade")
    array = {b"__ndarray__": True, b"data": text.tobytes(), b"dtype": text.dtype.str, b"shape": []}
    assert unpack(msgpack.packb({"prompt": array})) == unpack(pack({"prompt": text})) == {"prompt": "öffne die Schublade"}
    assert unpack(pack({"prompt": np.array(["a", "bc"])})) == {"prompt": ["a", "bc"]}


def test_messages_are_openpis():
    message = {"x": np.arange(3, dtype=np.float32), "n": np.int64(5)}
    assert pack(message) == OPENPI
    np.testing.assert_array_equal(unpack(OPENPI)["x"], message["x"])
    assert unpack(OPENPI)["n"] == 5


@pytest.mark.parametrize(
    "value", [object(), np.array([object()]), np.array([1j]), np.array([b"a"]), np.ma.masked_equal([1, 2], 1), {1, 2}, 2**70]
)
def test_what_cannot_be_sent(value):
    with pytest.raises(ProtocolError, match="cannot be sent"):
        pack({"x": value})


def test_what_cannot_be_sent_is_named():
    with pytest.raises(
        ProtocolError, match=r"^field 'images': field 'top': this value cannot be sent: '\{1\}' is a set; expected a map"
    ):
        pack({"state": 1.0, "images": {"top": {1}}})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dtype": "|O"}, r"dtype '\|O'; expected one of"),
        ({"dtype": "<U4"}, "dtype <U4 comes with 8 bytes; expected 32"),
        ({"dtype": "<U0"}, "dtype '<U0'"),
        ({"dtype": "<U99999"}, "dtype '<U99999'"),
        ({"dtype": "<U1", "data": (2**31).to_bytes(4, "little") * 2}, "not valid msgpack: UnicodeDecodeError"),
        ({"dtype": "<U1", "data": (0xD800).to_bytes(4, "little") * 2}, "not valid msgpack: UnicodeDecodeError"),
        ({"dtype": "<U1", "data": b"a\0\0\0" * 10001, "shape": [10001]}, "10001 entries; expected at most 10000"),
        ({"dtype": "<M8[s]"}, "dtype '<M8"),
        ({"dtype": [["a", "<f4"]]}, "dtype"),
        ({"dtype": "f4,f4"}, "dtype"),
        ({"shape": [3]}, r"shape \[3\] and dtype <f4 comes with 8 bytes; expected 12"),
        ({"shape": [2**62, 2**62]}, "expected at most 8 sizes"),
        ({"shape": [2**30, 2**30, 2**30]}, "comes with 8 bytes; expected"),
        ({"shape": [-2]}, "sizes of zero or more"),
        ({"shape": [True, 2]}, "sizes of zero or more"),
        ({"shape": [1] * 9}, "at most 8 sizes"),
        ({"shape": 2}, "sizes of zero or more"),
        ({"data": "12345678"}, "data of an array are a str"),
        ({"data": ...}, "has the fields"),
        ({"more": 1}, "has the fields"),
    ],
)
def test_arrays_that_are_none(changes, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        unpack(msgpack.packb(array_fields(**changes)))


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not valid msgpack"),
        (b"\xc1", "not valid msgpack"),
        (pack({"a": 1})[:-1], "not valid msgpack"),
        (pack({"a": 1}) + b"\x01", "not valid msgpack"),
        (msgpack.packb([1]), "the message is a list; expected a map"),
        (b"\xdd\xff\xff\xff\xff", "not valid msgpack"),  # a list that claims four billion entries
        (b"\xc6\xff\xff\xff\xff", "not valid msgpack"),
        (msgpack.packb(nested(9)), "nested more than 8 deep"),
        (b"\x81\xa1a" * 5000 + b"\x01", "not valid msgpack"),
        (msgpack.packb({"a": [[0] * 2000] * 6}), "more than 10000 items"),
        (msgpack.packb({"a": [[[]] * 2000] * 6}), "more than 10000 items"),
        (msgpack.packb({b"a": 1}), "expected strings as keys"),
        (msgpack.packb({1: 1}), "not valid msgpack"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "not valid msgpack"),
        (msgpack.packb({"a": msgpack.Timestamp(1)}), "not valid msgpack"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}), "data of a NumPy scalar are a str"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}), "not valid msgpack"),
    ],
)
def test_bytes_that_are_no_message(data, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        unpack(data)


def test_errors_are_text_with_their_kind():
    assert parse_error(error_text("expired", "too late: 3 s")) == ("expired", "too late: 3 s")
    assert parse_error("Traceback (most recent call last): ...")[0] == "internal"  # of another server
