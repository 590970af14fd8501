"""What streaming makes of the state topics."""

import pytest

from libs.errors import NotReadyError
from libs.messaging import cloudevents
from libs.messaging.records import Record
from schemas.registry import EndpointSnapshot, Replica
from schemas.topics import STATE_DEPLOYMENTS, STATE_ENDPOINTS
from services.streaming.state import State
from tests.unit.streaming.conftest import ID, NOW, deployment

ONE = Replica(replica_id="one", address="unix:/one")
ENDPOINT = EndpointSnapshot(endpoint_name="shop", traffic={ID: 100}, deployment_ids=(ID,), created_at=NOW, updated_at=NOW)


def said(payload) -> Record:
    return cloudevents.write(cloudevents.new_event(payload, "/test", now=NOW))


def known() -> State:
    state = State()
    for payload in (ENDPOINT, deployment(replicas=(ONE,))):
        state.apply(said(payload))
    return state


def test_a_deployment_that_answers_is_routed_to():
    state = known()
    assert state.route("shop", 0.5).replicas == (ONE,)
    assert state.replicas() == {ONE}
    assert state.changed.is_set()


def test_an_endpoint_that_is_gone_is_not_ready():
    state = known()
    state.apply(cloudevents.tombstone(STATE_ENDPOINTS.name, "shop"))
    with pytest.raises(NotReadyError, match="no endpoint 'shop'"):
        state.route("shop", 0.5)


def test_replicas_of_a_deployment_that_is_gone_are_forgotten():
    state = known()
    state.apply(cloudevents.tombstone(STATE_DEPLOYMENTS.name, ID))
    assert state.replicas() == set()


@pytest.mark.parametrize(
    "stray",
    [
        Record(STATE_DEPLOYMENTS.name, ID.encode(), b"not json"),
        Record(STATE_DEPLOYMENTS.name, b"another", said(deployment()).value, said(deployment()).headers),
        Record(STATE_DEPLOYMENTS.name, b"shop", said(ENDPOINT).value, said(ENDPOINT).headers),
    ],
    ids=["unreadable", "under-another-key", "on-another-topic"],
)
def test_a_stray_record_changes_nothing(stray):
    state = known()
    state.apply(stray)
    assert state.route("shop", 0.5).replicas == (ONE,)
