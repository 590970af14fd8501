"""Requests joined into a batch."""

import numpy as np
import pytest

from libs.inference.batches import join, whole
from libs.inference.requests import InferRequest


@pytest.mark.parametrize("columns", [2, 5_000])
@pytest.mark.parametrize("dtype", [float, object])
def test_a_batch_has_the_rows_of_its_requests_in_order(columns, dtype):
    requests = [InferRequest({"x": np.full((rows, columns), rows, dtype)}) for rows in (1, 2, 3)]
    joined = whole(join(requests))
    assert joined["x"].shape == (6, columns)
    assert joined["x"][:, 0].tolist() == [1, 2, 2, 3, 3, 3]


def test_large_inputs_are_not_copied():
    requests = [InferRequest({"x": np.zeros((1_000, 30))}) for _ in range(2)]
    joined = join(requests)["x"]
    assert [part is request.inputs["x"] for part, request in zip(joined, requests, strict=True)] == [True, True]
