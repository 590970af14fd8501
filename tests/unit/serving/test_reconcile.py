"""Desired state and what Serve runs, in; what to do and what to tell, out."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from schemas.environment import EnvironmentLock
from schemas.inference import Datatype, Signature, TensorSpec
from schemas.registry import Artifact, ArtifactFormat, DeploymentSnapshot, DeploymentStatus, Replica
from schemas.serving import DeploymentChanged, DeploymentFailed, DeploymentReady, DeploymentRemoved
from services.serving.reconcile import ActualDeployment, Apply, AppStatus, Delete, DesiredDeployment, Report, Scale, plan
from services.serving.spec import Limits, Places, replica_spec

ID = "cancer.cancer.1"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
ONE = Replica(replica_id="a", address="unix:/a")
TWO = Replica(replica_id="b", address="unix:/b")
ABOUT = {"endpoint_name": "cancer", "deployment_id": ID}


def snapshot(**changes: object) -> DeploymentSnapshot:
    tensor = TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, 4))
    base = DeploymentSnapshot(
        deployment_id=ID,
        generation=1,
        endpoint_name="cancer",
        model_name="cancer",
        version=1,
        status=DeploymentStatus.PENDING,
        artifact=Artifact(sha256="0" * 64, size_bytes=1, filename="m.joblib"),
        format=ArtifactFormat.SKLEARN,
        environment=EnvironmentLock(environment_id="0" * 16, python="3.11", platform="x86_64-linux", lock=""),
        signature=Signature(inputs=(tensor,), outputs=(tensor,)),
        min_replicas=1,
        max_replicas=1,
        pending_traffic_percent=100,
        created_at=NOW,
        updated_at=NOW,
    )
    return base.model_copy(update=changes)


def actual(**changes: object) -> ActualDeployment:
    values: dict[str, object] = {"generation": 1, "digest": "d", "target_replicas": 1, "status": AppStatus.RUNNING, "replicas": (ONE,)}
    return ActualDeployment(**{**values, **changes})


def due(wanted: DeploymentSnapshot | None, running: ActualDeployment | None, reported: object = None) -> tuple[object, ...]:
    desired = {} if wanted is None else {ID: DesiredDeployment(wanted, "d")}
    return plan(desired, {} if running is None else {ID: running}, {} if reported is None else {ID: reported})


READY = {"status": DeploymentStatus.READY, "pending_traffic_percent": None, "replicas": (ONE,)}


def test_what_is_wanted_and_missing_is_applied() -> None:
    assert due(snapshot(), None) == (Apply(snapshot()),)


def test_what_runs_as_wanted_and_is_known_needs_nothing() -> None:
    assert due(snapshot(**READY), actual()) == ()


def test_an_application_nobody_wants_is_deleted() -> None:
    assert due(None, actual()) == (Delete(ID),)


def test_an_application_that_is_being_deleted_is_left_alone() -> None:
    assert due(None, actual(status=AppStatus.DELETING)) == ()
    assert due(snapshot(), actual(status=AppStatus.DELETING)) == ()


def test_another_content_is_applied() -> None:
    assert due(snapshot(**READY), actual(digest="other")) == (Apply(snapshot(**READY)),)


def test_another_number_of_replicas_is_scaled_without_applying() -> None:
    wanted = snapshot(**READY, generation=2, min_replicas=2)
    assert due(wanted, actual()) == (Scale(ID, 2, 2),)


def test_a_newer_generation_of_the_same_is_noted_without_applying() -> None:
    assert due(snapshot(**READY, generation=2), actual()) == (Scale(ID, 2, 1),)


def test_a_failed_application_is_applied_again_for_a_newer_generation_only() -> None:
    failed = actual(status=AppStatus.FAILED, replicas=(), message="no")
    assert due(snapshot(generation=2), failed) == (Apply(snapshot(generation=2)),)
    assert due(snapshot(status=DeploymentStatus.FAILED), failed) == ()


def test_ready_is_reported_when_every_replica_answers() -> None:
    assert due(snapshot(min_replicas=2), actual(target_replicas=2)) == ()
    (report,) = due(snapshot(min_replicas=2), actual(target_replicas=2, replicas=(ONE, TWO)))
    assert report == Report(ID, DeploymentReady(**ABOUT, generation=1, replicas=(ONE, TWO)))


def test_a_running_application_without_an_answering_runner_is_not_ready() -> None:
    assert due(snapshot(), actual(replicas=())) == ()


def test_traffic_that_waits_makes_a_running_deployment_ready_again() -> None:
    wanted = snapshot(**{**READY, "pending_traffic_percent": 10})
    assert due(wanted, actual()) == (Report(ID, DeploymentReady(**ABOUT, generation=1, replicas=(ONE,))),)


def test_a_lost_replica_is_reported_with_the_reason() -> None:
    gone = actual(replicas=(), message="the runner was ended by SIGKILL")
    assert due(snapshot(**READY), gone) == (
        Report(ID, DeploymentChanged(**ABOUT, generation=1, replicas=(), reason="the runner was ended by SIGKILL")),
    )


def test_a_replica_that_came_back_elsewhere_is_reported() -> None:
    degraded = snapshot(**{**READY, "status": DeploymentStatus.DEGRADED, "replicas": ()})
    assert due(degraded, actual(replicas=(TWO,))) == (Report(ID, DeploymentChanged(**ABOUT, generation=1, replicas=(TWO,))),)


def test_the_order_of_replicas_is_no_change() -> None:
    wanted = snapshot(**{**READY, "replicas": (TWO, ONE), "min_replicas": 2})
    assert due(wanted, actual(target_replicas=2, replicas=(ONE, TWO))) == ()


def test_failure_is_reported_once_with_its_reason() -> None:
    failed = actual(status=AppStatus.FAILED, replicas=(), message="the model does not load")
    fact = DeploymentFailed(**ABOUT, generation=1, reason="the model does not load")
    assert due(snapshot(), failed) == (Report(ID, fact),)
    assert due(snapshot(), failed, fact) == ()


def test_a_fact_that_the_log_does_not_reflect_yet_is_not_published_twice() -> None:
    fact = DeploymentReady(**ABOUT, generation=1, replicas=(ONE,))
    assert due(snapshot(), actual(), fact) == ()


def test_removal_deletes_first_and_is_reported_when_nothing_is_left() -> None:
    removing = snapshot(**{**READY, "status": DeploymentStatus.REMOVING})
    assert due(removing, actual()) == (Delete(ID),)
    assert due(removing, actual(status=AppStatus.DELETING)) == ()
    assert due(removing, None) == (Report(ID, DeploymentRemoved(**ABOUT, generation=1)),)


@pytest.mark.parametrize(("change", "differs"), [({"generation": 2, "min_replicas": 3}, False), ({"version": 2}, True)])
def test_the_digest_of_a_spec_covers_what_runs_and_nothing_else(change: dict[str, object], differs: bool) -> None:
    places = Places(
        artifacts_url="file:///artifacts", artifact_cache_dir=Path("/cache"), environments_dir=Path("/e"), runner_key_file=Path("/key")
    )
    before, after = replica_spec(snapshot(), places, Limits()), replica_spec(snapshot(**change), places, Limits())
    assert (before.digest != after.digest) is differs
