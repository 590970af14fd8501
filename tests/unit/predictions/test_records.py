"""Records of the prediction log are read as they were written."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from libs.errors import InvalidMessage
from libs.messaging.records import Record
from libs.predictions import records
from libs.predictions.records import COLUMNS, Block, PredictionBatch
from schemas.predictions import InstanceState, RequestCounters, RequestsCounted

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record(count=2, blocks=(), **head):
    columns = {name: np.arange(1, count + 1).astype(dtype) for name, dtype in COLUMNS.items()}
    columns["outcome"] = np.arange(count, dtype="u1") % 3
    columns |= {name: np.zeros(count, COLUMNS[name]) for name in ("error", "protocol", "principal")}
    fields = {
        "instance": "i", "record": 3, "endpoint_name": "churn", "request_ids": [f"r{number}" for number in range(count)],
        "outcomes": records.OUTCOMES, "errors": [""], "protocols": ["v1"], "principals": ["alice"],
        "counters": RequestCounters(accepted=9).model_dump(), **head,
    }  # fmt: skip
    return records.write(fields, columns, blocks, NOW)


def test_columns_come_back():
    batch = records.read(record())
    assert isinstance(batch, PredictionBatch)
    assert len(batch) == 2
    assert [(row["request_id"], row["sequence"], row["outcome"], row["principal"]) for row in batch.rows()] == [
        ("r0", 1, "completed", "alice"),
        ("r1", 2, "failed", "alice"),
    ]


def test_blocks_come_back_request_by_request():
    block = Block(
        np.array([7, 8]), np.array([2, 1], "<u4"), {"x": np.arange(6.0).reshape(3, 2), "s": np.array([b"a", b"", None], object)}, {}
    )
    (read,) = records.read(record(blocks=[block])).blocks
    requests = [(sequence, inputs["x"].tolist(), inputs["s"].tolist(), outputs) for sequence, inputs, outputs in read.requests()]
    assert requests == [(7, [[0.0, 1.0], [2.0, 3.0]], [b"a", b""], {}), (8, [[4.0, 5.0]], [None], {})]


def test_a_record_is_a_cloudevent_keyed_by_its_endpoint():
    written = record()
    headers = dict(written.headers)
    assert written.key == b"churn"
    assert headers["ce_id"] == b"i-3"
    assert headers["content-type"] == b"application/octet-stream"
    assert written.value[: int(headers["inference-header-content-length"])].endswith(b"}")


def test_counts_come_back():
    counted = RequestsCounted(instance="i", state=InstanceState.STOPPED, records=4, counters=RequestCounters(accepted=2))
    assert records.read(records.write_count(counted, 5, NOW)) == counted


def test_another_type_of_event_is_passed_over():
    headers = tuple((name, b"millrace.new.thing.v1" if name == "ce_type" else value) for name, value in record().headers)
    assert records.read(replace(record(), headers=headers)) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value[:-1],
        lambda value: value + b"x",
        lambda value: b"{}" + value[2:],
        lambda value: value.replace(b'"r1"', b'"r",', 1),
        lambda value: value.replace(b'"shape":[2]', b'"shape":[3]', 1),
    ],
)
def test_a_damaged_record_is_refused(damage):
    written = record()
    with pytest.raises(InvalidMessage, match="is not millrace.gateway.predictions.logged.v1"):
        records.read(replace(written, value=damage(written.value)))


def test_a_record_without_the_length_of_its_head_is_refused():
    written = record()
    headers = tuple(header for header in written.headers if header[0] != records.HEAD_LENGTH)
    with pytest.raises(InvalidMessage):
        records.read(Record(written.topic, written.key, written.value, headers))
