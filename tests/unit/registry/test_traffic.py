"""Traffic arithmetic."""

import doctest

from hypothesis import given
from hypothesis import strategies as st

from services.registry import traffic


def test_examples_in_the_documentation():
    assert doctest.testmod(traffic).failed == 0


@given(
    shares=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 100)),
    newcomer=st.sampled_from("abz"),
    percent=st.integers(0, 100),
)
def test_every_split_sums_to_100_or_is_empty(shares, newcomer, percent):
    split = traffic.with_share(shares, newcomer, percent)
    assert sum(split.values()) == 100
    assert all(0 < share <= 100 for share in split.values())
    assert sum(traffic.without(shares, newcomer).values()) in (0, 100)
