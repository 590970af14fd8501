"""Which answers are compressed."""

import pytest

from services.gateway.doors.compression import MAX_COMPRESSED_BYTES, MIN_COMPRESSED_BYTES, compressed
from services.gateway.exchange import Outgoing


@pytest.mark.parametrize(
    ("size_bytes", "is_compressed"),
    [
        (MIN_COMPRESSED_BYTES - 1, False),
        (MIN_COMPRESSED_BYTES, True),
        (MAX_COMPRESSED_BYTES, True),
        (MAX_COMPRESSED_BYTES + 1, False),
    ],
)
def test_short_and_long_answers_stay_as_they_are(size_bytes, is_compressed):
    answer = compressed(Outgoing(bytes(size_bytes)), b"gzip")
    assert (len(answer.body) < size_bytes) == is_compressed
    assert ((b"content-encoding", b"gzip") in answer.headers) == is_compressed
