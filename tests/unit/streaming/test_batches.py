"""Which requests are asked together, and how many rows at once."""

import json
from typing import Any

import pytest

from libs.inference.routing import Route
from schemas.inference import Datatype, Signature, TensorSpec
from services.streaming.batches import FIRST, TARGET_S, Grouping, Item, Pace
from services.streaming.log import Taken
from services.streaming.requests import Request
from tests.unit.streaming.conftest import ID, signature

ROUTE = Route("shop", ID, "iris", 3, signature(), ())
FIXED = Signature(
    inputs=(TensorSpec(name="input", datatype=Datatype.FP64, shape=(1, 2)),),
    outputs=(TensorSpec(name="predict", datatype=Datatype.FP64, shape=(1,)),),
)


def item(body: Any) -> Item:
    made = Item(Request(Taken(0, 0, None, json.dumps(body).encode(), (), 0), "requests", "shop"))
    made.read()
    return made


def rows(*values: float) -> dict[str, Any]:
    return {"instances": [[value, 0] for value in values]}


def tensor(*values: float) -> dict[str, Any]:
    return {"name": "input", "datatype": "FP64", "shape": [len(values), 2], "data": [[value, 0] for value in values]}


def grouped(items: list[Item], limit: int = 100, route: Route = ROUTE) -> tuple[list[list[float]], list[Item]]:
    """The first column of each batch, and what cannot be asked."""
    grouping = Grouping()
    for each in items:
        grouping.add(each, route, is_alone=False)
    batches = grouping.batches(limit)
    assert all(batch.rows == len(batch.inputs["input"]) for batch in batches)
    return [batch.inputs["input"][:, 0].tolist() for batch in batches], [each for each, _ in grouping.failed]


def test_rows_of_many_requests_are_one_tensor():
    assert grouped([item(rows(1)), item(rows(2, 3)), item(rows(4))]) == ([[1, 2, 3, 4]], [])


def test_a_batch_has_at_most_so_many_rows_unless_one_request_has_more():
    batches, _ = grouped([item(rows(*range(5))), item(rows(5)), item(rows(6)), item(rows(7))], limit=2)
    assert batches == [[0, 1, 2, 3, 4], [5, 6], [7]]


def test_a_row_that_does_not_fit_is_found_and_the_others_stay_together():
    bad = item({"instances": [[1, 2, 3]]})
    assert grouped([item(rows(1)), bad, item(rows(2))]) == ([[1, 2]], [bad])


def test_requests_that_ask_for_different_outputs_are_not_joined():
    plain, named = item(rows(1)), item({**rows(2), "outputs": ["predict"]})
    assert grouped([plain, named])[0] == [[1], [2]]


def test_requests_that_ask_for_the_same_outputs_by_other_names_are_not_joined():
    outputs = tuple(TensorSpec(name=name, datatype=Datatype.FP64, shape=(-1,)) for name in ("predict", "score_0", "score_1"))
    route = Route("shop", ID, "iris", 3, Signature(inputs=signature().inputs, outputs=outputs), ())
    together, apart = item({**rows(1), "outputs": ["score"]}), item({**rows(2), "outputs": ["score_0", "score_1"]})
    assert grouped([together, apart], route=route)[0] == [[1], [2]]


def test_requests_in_v2_are_joined_with_each_other():
    batches, _ = grouped([item({"inputs": [tensor(1)]}), item(rows(3)), item({"inputs": [tensor(2)]})])
    assert batches == [[3], [1, 2]]


def test_requests_in_v2_are_asked_for_all_outputs_or_for_those_that_they_name():
    outputs = tuple(TensorSpec(name=name, datatype=Datatype.FP64, shape=(-1,)) for name in ("predict", "score"))
    route = Route("shop", ID, "iris", 3, Signature(inputs=signature().inputs, outputs=outputs), ())
    flat = [{**tensor(value), "data": [value, 0]} for value in range(6)]
    named = [{"name": "score"}]
    documents = [
        {"inputs": [flat[0]]},
        {"inputs": [flat[1]]},
        {"inputs": [flat[2]], "outputs": named},
        {"inputs": [flat[3]], "outputs": named},
    ]
    grouping = Grouping()
    for document in [*documents, {"inputs": [flat[4]], "outputs": []}, {"inputs": [flat[5]], "id": "x"}, rows(6)]:
        grouping.add(item(document), route, is_alone=False)
    batches = grouping.batches(100)
    both = ("predict", "score")
    assert sorted((batch.inputs["input"][:, 0].tolist(), batch.outputs) for batch in batches) == [
        ([0, 1], both),
        ([2, 3], ("score",)),
        ([4, 5], both),
        ([6], None),
    ]
    assert [batch.is_plain for batch in batches] == [True, True, True, False]
    assert all(part.outputs == batch.outputs for batch in batches for part in batch.parts(1))


@pytest.mark.parametrize(
    "outputs", [[{"name": "nope"}], [{"name": 1}], ["predict"], {}, [{"name": "predict", "parameters": {"binary_data": 1}}]]
)
def test_outputs_that_are_none_fail_alone(outputs):
    flat = {**tensor(1), "data": [1, 0]}
    bad = item({"inputs": [flat], "outputs": outputs})
    assert grouped([item({"inputs": [flat]}), bad, item({"inputs": [flat], "outputs": [{"name": "predict"}]})]) == ([[1], [1]], [bad])


@pytest.mark.parametrize(
    "odd",
    [
        {"shape": [2, 2], "data": [1, 2, 3]},
        {"shape": [1, 2], "data": [1, 2, 3, 4, 5, 6]},
        {"shape": [True, 2]},
        {"shape": [0, 2], "data": []},
        {"datatype": "FP32"},
        {"parameters": {}},
    ],
)
def test_a_tensor_that_is_not_plain_shifts_nobody_elses_rows(odd):
    flat = {"name": "input", "datatype": "FP64", "shape": [1, 2]}
    plain = [item({"inputs": [{**flat, "data": [value, 0]}]}) for value in (1, 2, 3)]
    strange = item({"inputs": [{**flat, "data": [9, 0], **odd}]})
    batches, failed = grouped([plain[0], strange, *plain[1:]])
    assert [1, 2, 3] in batches
    assert len(batches) + len(failed) == 2


def test_a_model_without_a_batch_dimension_is_asked_one_request_at_a_time():
    batches, _ = grouped([item(rows(1)), item(rows(2))], route=Route("shop", ID, "iris", 3, FIXED, ()))
    assert batches == [[1], [2]]


def test_halves_have_the_rows_of_their_requests():
    grouping = Grouping()
    items = [item(rows(1)), item(rows(2, 3)), item(rows(4))]
    for each in items:
        grouping.add(each, ROUTE, is_alone=False)
    (batch,) = grouping.batches(100)
    parts = list(batch.parts(2))
    assert [part.inputs["input"][:, 0].tolist() for part in parts] == [[1, 2, 3], [4]]
    assert [part.items for part in parts] == [items[:2], items[2:]]


def test_the_pace_doubles_while_the_model_is_quick_and_never_beyond_the_most():
    pace = Pace(200, TARGET_S)
    for _ in range(5):
        pace.cost(pace.count, 0.001)
    assert pace.count == 200


def test_the_pace_halves_while_the_model_is_slow_and_never_below_one():
    pace = Pace(200, TARGET_S)
    for _ in range(20):
        pace.cost(pace.count, 2 * TARGET_S)
    assert pace.count == 1


@pytest.mark.parametrize("count", [1, FIRST - 1])
def test_a_small_batch_says_nothing_about_larger_ones(count):
    pace = Pace(200, TARGET_S)
    pace.cost(count, 0.001)
    assert pace.count == FIRST
