"""Header compression, against the examples of its RFC and against another encoder."""

import contextlib

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.rpc.hpack import CompressionError, HeaderDecoder, encode, is_sound

NAMES = st.from_regex(rb"[a-z][a-z0-9-]{0,20}", fullmatch=True)
VALUES = st.binary(max_size=300).filter(lambda value: not set(value) & set(b"\0\r\n"))


def test_the_requests_of_the_rfc_with_huffman_coding():
    decoder = HeaderDecoder()
    first = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")]
    assert decoder.decode(bytes.fromhex("828684418cf1e3c2e5f23a6ba0ab90f4ff")) == first
    assert decoder.decode(bytes.fromhex("828684be5886a8eb10649cbf")) == [*first, (b"cache-control", b"no-cache")]
    third = decoder.decode(bytes.fromhex("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"))
    assert third[-1] == (b"custom-key", b"custom-value")


@given(st.lists(st.lists(st.tuples(NAMES, VALUES), max_size=8), max_size=6), st.booleans())
def test_what_another_encoder_writes_is_read_block_after_block(blocks, huffman):
    encoder, decoder = hpack.Encoder(), HeaderDecoder()
    for block in blocks:
        assert decoder.decode(encoder.encode(block, huffman)) == block


@given(st.lists(st.tuples(NAMES, VALUES), max_size=8))
def test_what_is_written_here_another_decoder_reads(fields):
    assert [tuple(field) for field in hpack.Decoder().decode(encode(fields), raw=True)] == fields


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(block):
    decoder = HeaderDecoder()
    with contextlib.suppress(CompressionError):
        assert all(len(field) == 2 for field in decoder.decode(block))


@pytest.mark.parametrize("block", ["80", "ff00", "c0", "40", "400161", "40016105", "7fffffffffffffff7f", "3fe21f", "8220"])
def test_what_is_malformed_is_refused(block):
    with pytest.raises(CompressionError):
        HeaderDecoder().decode(bytes.fromhex(block))


def test_a_short_block_of_many_fields_is_refused():
    with pytest.raises(CompressionError, match="300 fields; at most 256"):
        HeaderDecoder().decode(b"\x82" * 300)


def test_old_fields_leave_the_table_as_its_size_says():
    encoder, decoder = hpack.Encoder(), HeaderDecoder()
    for number in range(500):
        field = (b"x-%d" % number, b"v" * 50)
        assert decoder.decode(encoder.encode([field, (b"x-0", b"v" * 50)])) == [field, (b"x-0", b"v" * 50)]
    assert decoder._size <= 4096
    encoder.header_table_size = 0
    assert decoder.decode(encoder.encode([(b"a", b"b")])) == [(b"a", b"b")]
    assert (decoder._size, len(decoder._dynamic)) == (0, 0)


def test_a_decoder_remembers_that_something_unsound_came():
    encoder, decoder = hpack.Encoder(), HeaderDecoder()
    decoder.decode(encoder.encode([(b"x-good", b"1")]))
    assert not decoder.is_suspect
    decoder.decode(encoder.encode([(b"X-Bad", b"1")]))
    assert decoder.is_suspect


@pytest.mark.parametrize(
    ("name", "value", "sound"),
    [
        (b"x-a", b"1", True),
        (b"te", b"trailers", True),
        (b"te", b"gzip", False),
        (b"connection", b"close", False),
        (b"Upper", b"1", False),
        (b"", b"1", False),
        (b":path", b"/", True),
        (b":other", b"1", False),
        (b"x", b"a\r\nb", False),
    ],
)
def test_which_fields_a_request_may_have(name, value, sound):
    assert is_sound(name, value) is sound
