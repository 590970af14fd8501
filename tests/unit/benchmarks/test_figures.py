import math

import pytest

from benchmarks.figures import Load, median_load, percentile, rotated


def load(per_s, p50=1.0, p99=2.0, requests=10, errors=0):
    return Load(per_s, p50, p99, requests, errors)


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (10, 1), (50, 5), (51, 6), (90, 9), (99, 10), (100, 10)])
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percent, value):
    assert percentile(range(1, 11), percent) == value


def test_nothing_has_no_percentile():
    assert math.isnan(percentile([], 50))


def test_each_figure_of_a_median_load_is_its_own_median_and_errors_are_summed():
    rounds = [load(100, 3.0, 9.0, errors=1), load(300, 1.0, 7.0), load(200, 2.0, 8.0, errors=2)]
    assert median_load(rounds) == Load(200, 2.0, 8.0, 30, 3)


def test_no_rounds_have_no_median():
    assert median_load([]) is None


def test_every_server_goes_first_once():
    names = ["a", "b", "c"]
    assert [rotated(names, number) for number in range(4)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_nobody_can_be_rotated():
    assert rotated([], 3) == []
