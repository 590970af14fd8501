"""How an endpoint's traffic is split, in whole percent."""

from collections.abc import Mapping


def with_share(traffic: Mapping[str, int], newcomer: str, percent: int) -> dict[str, int]:
    """The split in which ``newcomer`` gets ``percent`` and the others keep their proportions in the rest.

    Without others the newcomer gets everything: an endpoint that has a deployment answers. Rounding is by largest remainder, so
    the sum stays 100.

    >>> with_share({"a": 75, "b": 25}, "c", 20)
    {'a': 60, 'b': 20, 'c': 20}
    >>> with_share({}, "c", 20)
    {'c': 100}
    """
    others = {deployment: share for deployment, share in traffic.items() if deployment != newcomer and share > 0}
    if not others:
        return {newcomer: 100}
    return _drop_zeros(_apportioned(others, 100 - percent) | {newcomer: percent})


def without(traffic: Mapping[str, int], leaver: str) -> dict[str, int]:
    """The split once ``leaver`` is gone: its share goes to the others in their proportions; empty when there are none.

    >>> without({"a": 60, "b": 20, "c": 20}, "c")
    {'a': 75, 'b': 25}
    """
    others = {deployment: share for deployment, share in traffic.items() if deployment != leaver and share > 0}
    return _apportioned(others, 100) if others else {}


def _apportioned(weights: Mapping[str, int], total: int) -> dict[str, int]:
    whole = sum(weights.values())
    exact = {name: weight * total / whole for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: exact[name] - shares[name], reverse=True)
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _drop_zeros(traffic: Mapping[str, int]) -> dict[str, int]:
    return {name: share for name, share in traffic.items() if share > 0}
