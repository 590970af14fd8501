"""Frames and tensors survive the socket exactly, and malformed ones are refused before anything is allocated for them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.runner import wire


def joined(parts: list[wire.Buffer]) -> bytes:
    return b"".join(parts)


def roundtrip(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    specs, buffers = wire.encode_tensors(arrays)
    read = wire.read_descriptions(wire.describe_tensors(specs))
    assert read == specs
    return wire.decode_tensors(read, bytearray(joined(buffers)))


@pytest.mark.parametrize("datatype", [name for name in wire.NUMPY_DTYPES if name != "BYTES"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0, 4)])
def test_numbers_survive_with_their_type_and_shape(datatype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(wire.NUMPY_DTYPES[datatype])
    back = roundtrip({"a": array})["a"]
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


def test_arrays_of_any_layout_survive() -> None:
    base = np.arange(12.0).reshape(3, 4)
    back = roundtrip({"fortran": np.asfortranarray(base), "strided": base[:, ::2], "big": base.astype(">f8")})
    assert back["fortran"].tolist() == base.tolist()
    assert back["strided"].tolist() == base[:, ::2].tolist()
    assert back["big"].tolist() == base.tolist()


def test_strings_arrive_as_bytes() -> None:
    back = roundtrip({"a": np.array([["ü", ""], ["x" * 300, "z"]]), "b": np.array([b"\xff", "y"], dtype=object)})
    assert back["a"].tolist() == [["ü".encode(), b""], [b"x" * 300, b"z"]]
    assert back["b"].tolist() == [b"\xff", b"y"]


def test_missing_elements_cross_where_both_sides_know_of_them() -> None:
    texts = np.array([[b"a", None], [float("nan"), b""]], dtype=object)
    specs, buffers = wire.encode_tensors({"a": texts})
    tail = bytearray(joined(buffers))
    assert wire.decode_tensors(specs, tail, {"a"})["a"].tolist() == [[b"a", None], [None, b""]]
    for stranger in ((), {"b"}):
        with pytest.raises(wire.WireError, match="ends inside element 1"):
            wire.decode_tensors(specs, tail, stranger)
    with pytest.raises(wire.WireError, match="missing element"):
        wire.encode_tensor("a", texts)


def test_arrays_that_follow_an_odd_number_of_bytes_are_aligned() -> None:
    back = roundtrip({"a": np.array([True]), "b": np.array([1.5])})
    assert back["b"].flags.aligned
    assert back["b"].tolist() == [1.5]


def test_a_type_without_a_datatype_is_refused() -> None:
    with pytest.raises(wire.WireError, match="complex128"):
        wire.encode_tensor("a", np.array([1j]))


@pytest.mark.parametrize(
    ("description", "tail", "message"),
    [
        ({"name": "a", "datatype": "FP64", "shape": [2], "parameters": {"binary_data_size": 16}}, b"\0" * 8, "only 8 are left"),
        ({"name": "a", "datatype": "FP64", "shape": [2], "parameters": {"binary_data_size": 8}}, b"\0" * 8, "takes 16"),
        ({"name": "a", "datatype": "FP64", "shape": [1], "parameters": {"binary_data_size": 8}}, b"\0" * 9, "1 bytes follow"),
        ({"name": "a", "datatype": "FP64", "shape": [-1], "parameters": {"binary_data_size": 8}}, b"\0" * 8, "non-negative"),
        ({"name": "a", "datatype": "FP64", "shape": [True], "parameters": {"binary_data_size": 8}}, b"\0" * 8, "non-negative"),
        ({"name": "a", "datatype": "DATE", "shape": [1], "parameters": {"binary_data_size": 8}}, b"\0" * 8, "not supported"),
        ({"name": "a", "datatype": "FP64", "shape": [1]}, b"\0" * 8, "no binary_data_size"),
        ({"datatype": "FP64"}, b"", "no name"),
        ({"name": "a", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 4}}, b"\x05\0\0\0", "ends inside"),
        ({"name": "a", "datatype": "BYTES", "shape": [2**60], "parameters": {"binary_data_size": 4}}, b"\0" * 4, "fewer than"),
        ({"name": "a", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}, b"\0" * 5, "after its last"),
        ("a", b"", "not an object"),
    ],
)
def test_descriptions_that_lie_are_refused(description: object, tail: bytes, message: str) -> None:
    with pytest.raises(wire.WireError, match=message):
        wire.decode_tensors(wire.read_descriptions([description]), tail)


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=40)), min_size=1, max_size=4), st.integers(1, 50))
def test_frames_survive_any_way_of_cutting_the_stream(bodies: list[tuple[bytes, bytes]], step: int) -> None:
    stream = b"".join(joined(wire.encode_frame({"id": i}, head, [tail])) for i, (head, tail) in enumerate(bodies))
    reader = wire.FrameReader()
    frames = [frame for start in range(0, len(stream), step) for frame in reader.feed(stream[start : start + step])]
    assert [(frame.meta["id"], frame.head, bytes(frame.tail)) for frame in frames] == [(i, h, t) for i, (h, t) in enumerate(bodies)]


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.integers(1, 200))
def test_frames_survive_when_tails_are_received_in_their_place(tails: list[bytes], step: int) -> None:
    stream = b"".join(joined(wire.encode_frame({"id": i}, b"head", [tail])) for i, tail in enumerate(tails))
    reader, frames, position = wire.FrameReader(), [], 0
    while position < len(stream):
        room = reader.room
        if room is None:
            chunk = stream[position : position + step]
            frames += reader.feed(chunk)
        else:
            chunk = stream[position : position + min(step, len(room))]
            room[: len(chunk)] = chunk
            frames += reader.fill(len(chunk))
        position += len(chunk)
    assert [(frame.meta["id"], frame.head, bytes(frame.tail)) for frame in frames] == [(i, b"head", t) for i, t in enumerate(tails)]


def test_tails_of_one_chunk_do_not_share_memory() -> None:
    one, other = wire.FrameReader().feed(b"".join(joined(wire.encode_frame({"id": i}, b"", [b"same"])) for i in (1, 2)))
    one.tail[0] = 0
    assert bytes(other.tail) == b"same"


@pytest.mark.parametrize("shape", [[0, 2**70], [1] * 70])
@pytest.mark.parametrize("datatype", ["UINT8", "BYTES"])
def test_shapes_that_no_array_has_are_refused(shape: list[int], datatype: str) -> None:
    tail = b"" if 0 in shape else b"\0" * (4 if datatype == "BYTES" else 1)
    description = {"name": "a", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(tail)}}
    with pytest.raises(wire.WireError, match="cannot have shape"):
        wire.decode_tensors(wire.read_descriptions([description]), tail)


def test_a_name_that_occurs_twice_is_refused() -> None:
    (spec,), _ = wire.encode_tensors({"a": np.zeros(1)})
    with pytest.raises(wire.WireError, match="'a' occurs twice"):
        wire.read_descriptions(wire.describe_tensors([spec, spec]))


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "ü"]} ', "[]", "-0.0", '"x"'])
def test_json_is_read_as_the_standard_library_reads_it(text: str) -> None:
    assert wire.loads_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("text", [b"", b"{", b"{}x", b"\xff", b"nul"])
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whatever the library says)
        wire.loads_json(text)


@pytest.mark.parametrize(
    "prefix",
    [
        wire.PREFIX.pack(wire.META_LIMIT_BYTES + 1, 0, 0),
        wire.PREFIX.pack(2, wire.HEAD_LIMIT_BYTES + 1, 0),
        wire.PREFIX.pack(2, 0, wire.TAIL_LIMIT_BYTES + 1),
        wire.PREFIX.pack(0, 0, 0),
    ],
)
def test_lengths_beyond_the_limits_are_refused(prefix: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.FrameReader().feed(prefix)


def test_a_stranger_may_send_small_frames_only() -> None:
    with pytest.raises(wire.WireError, match="tail"):
        wire.FrameReader(trusted=False).feed(wire.PREFIX.pack(2, 0, 1))


@pytest.mark.parametrize("meta", [b"[]", b"{", b"\xff\xff"])
def test_a_meta_part_that_is_no_object_is_refused(meta: bytes) -> None:
    with pytest.raises(wire.WireError, match="meta"):
        wire.FrameReader().feed(wire.PREFIX.pack(len(meta), 0, 0) + meta)


@pytest.mark.parametrize("rows", [3, 20_000])
def test_arrays_whose_rows_follow_one_another_are_written_as_one(rows):
    pieces = [np.arange(rows * 2, dtype=float).reshape(rows, 2) + number for number in range(3)]
    one, written = wire.encode_tensors({"x": pieces, "y": np.ones(2)}), wire.encode_tensors({"x": np.concatenate(pieces), "y": np.ones(2)})
    assert one[0] == written[0]
    assert b"".join(one[1]) == b"".join(written[1])
