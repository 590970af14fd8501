"""Which deployment answers."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import NotFoundError, NotReadyError
from libs.inference.routing import ClusterAwayError, NoReplicaError, RoutingTable
from schemas.registry import ModelSnapshot
from schemas.topics import STATE_DEPLOYMENTS, STATE_ENDPOINTS, STATE_MODELS
from tests.unit.gateway.conftest import NOW, deployment, endpoint


def table(*snapshots) -> RoutingTable:
    made = RoutingTable()
    for snapshot in snapshots:
        made.apply(snapshot)
    return made


def shares(made: RoutingTable, **arguments) -> dict[str, int]:
    return dict(Counter(made.pick("e", random=(number + 0.5) / 100, **arguments).deployment_id for number in range(100)))


def test_requests_are_shared_by_traffic_percent():
    made = table(endpoint("a", "b", a=30, b=70), deployment("a"), deployment("b", version=2))
    assert shares(made) == {"a": 30, "b": 70}


def test_the_share_of_a_deployment_without_live_replicas_goes_to_the_others_in_their_proportions():
    made = table(endpoint("a", "b", "c", a=20, b=60, c=20), deployment("a", 0), deployment("b", version=2), deployment("c", version=3))
    assert shares(made) == {"b": 75, "c": 25}


def test_a_deployment_without_traffic_is_never_a_stand_in():
    made = table(endpoint("a", "b", a=100), deployment("a", 0), deployment("b", version=2))
    with pytest.raises(NoReplicaError, match="m@1 is without a live replica, m@2 is ready without traffic"):
        made.pick("e", random=0.5)
    assert made.pick("e", version=2, random=0.5).deployment_id == "b"


def test_a_cluster_that_is_away_is_said_only_of_what_has_no_replica():
    away = {"is_cluster_away": True, "reason": "Ray is away"}
    lost = table(endpoint("a", a=100), deployment("a", 0).model_copy(update=away))
    with pytest.raises(ClusterAwayError, match=r"m@1 is without a live replica \(Ray is away\)"):
        lost.check("e")
    assert table(endpoint("a", a=100), deployment("a").model_copy(update=away)).choose("e", random=0).is_cluster_away
    half = table(endpoint("a", "b", a=50, b=50), deployment("a", 0).model_copy(update=away), deployment("b", 0, version=2))
    with pytest.raises(NoReplicaError):
        half.check("e")


def test_the_order_of_snapshots_does_not_matter():
    parts = [endpoint("a", a=100), deployment("a")]
    assert table(*parts).pick("e", random=0.1) == table(*reversed(parts)).pick("e", random=0.1)


def test_replicas_take_turns_and_the_others_stand_ready_behind():
    made = table(endpoint("a", a=100), deployment("a", 3))
    orders = [[replica.replica_id[-1] for replica in made.pick("e", random=0.5).replicas] for _ in range(4)]
    assert orders == [["0", "1", "2"], ["1", "2", "0"], ["2", "0", "1"], ["0", "1", "2"]]


def test_an_alias_means_the_version_it_points_at_now():
    model = ModelSnapshot(model_name="m", latest_version=2, aliases={"prod": 2}, created_at=NOW, updated_at=NOW)
    made = table(endpoint("a", "b", a=100), deployment("a"), deployment("b", version=2), model)
    assert made.pick("e", alias="prod", random=0).version == 2
    made.apply(model.model_copy(update={"aliases": {"prod": 1}}))
    assert made.pick("e", alias="prod", random=0).version == 1
    with pytest.raises(NotFoundError, match="no version with the alias 'other' is deployed to endpoint 'e'; deployed: m@1, m@2"):
        made.pick("e", alias="other", random=0)
    made.remove(STATE_MODELS.name, "m")
    with pytest.raises(NotFoundError):
        made.pick("e", alias="prod", random=0)


def test_one_version_number_of_two_models_is_shared_by_their_traffic():
    made = table(endpoint("a", "b", a=25, b=75), deployment("a", model="x"), deployment("b", model="y"))
    assert shares(made, version=1) == {"a": 25, "b": 75}


def test_what_does_not_exist_is_not_found():
    made = table(endpoint("a", a=100), deployment("a"))
    with pytest.raises(NotFoundError, match="there is no endpoint 'x'"):
        made.pick("x", random=0)
    with pytest.raises(NotFoundError, match="version 7 is not deployed to endpoint 'e'; deployed: m@1"):
        made.pick("e", version=7, random=0)


def test_nothing_that_could_answer_is_not_ready_and_not_worth_waiting_for():
    for made in (table(endpoint()), table(endpoint("a"), deployment("a", 0, status="pending"))):
        with pytest.raises(NotReadyError) as caught:
            made.pick("e", random=0)
        assert not isinstance(caught.value, NoReplicaError)


def test_a_failed_deployment_says_why():
    made = table(endpoint("a", a=100), deployment("a", 0, status="failed", reason="out of memory"))
    with pytest.raises(NotReadyError, match=r"m@1 is failed \(out of memory\)"):
        made.pick("e", random=0)


def test_a_deployment_being_removed_takes_no_requests():
    made = table(endpoint("a", "b", a=50, b=50), deployment("a", status="removing"), deployment("b", version=2))
    assert shares(made) == {"b": 100}


def test_tombstones_remove():
    made = table(endpoint("a", a=100), deployment("a"))
    made.remove(STATE_DEPLOYMENTS.name, "a")
    with pytest.raises(NotReadyError):
        made.check("e")
    made.remove(STATE_ENDPOINTS.name, "e")
    assert made.endpoint_names() == []
    with pytest.raises(NotFoundError):
        made.check("e")


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.floats(0, 1, exclude_max=True),
)
def test_a_pick_is_always_live_and_has_traffic(traffic, replicas, random):
    ids = [f"d{number}" for number in range(len(traffic))]
    made = table(endpoint(*ids, **dict(zip(ids, traffic, strict=True))))
    for number, name in enumerate(ids):
        made.apply(deployment(name, replicas[number], version=number + 1))
    possible = {name for number, name in enumerate(ids) if traffic[number] and replicas[number]}
    if possible:
        route = made.pick("e", random=random)
        assert route.deployment_id in possible
        assert route.replicas
    else:
        with pytest.raises(NotReadyError):
            made.pick("e", random=random)
