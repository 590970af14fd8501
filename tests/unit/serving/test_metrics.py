"""What serving counts."""

from libs.messaging import cloudevents
from libs.metrics import Metrics
from schemas.registry import Replica
from services.serving.metrics import DamageMetrics, DeploymentMetrics
from services.serving.reconcile import ActualDeployment, AppStatus, Damage
from services.serving.state import State
from tests.unit.serving.conftest import NOW, deployment


def put(state: State, **changes) -> None:
    state.apply(cloudevents.write(cloudevents.new_event(deployment(**changes), "/millrace/registry", now=NOW)))


def replicas(*names: str) -> tuple[Replica, ...]:
    return tuple(Replica(replica_id=name, address=f"unix:/{name}") for name in names)


def test_deployments_replicas_and_restarts_are_counted():
    metrics = Metrics()
    measures = DeploymentMetrics(metrics)
    state = State(measures.changed)
    measures.watch(state.deployments)

    def value(name):
        return sum(sample.value for sample in metrics.samples() if sample.metric.name == name)

    put(state, status="pending", replicas=())
    put(state, status="ready", replicas=replicas("a", "b"))
    assert (value("millrace_deployments"), value("millrace_replicas"), value("millrace_runner_restarts_total")) == (1, 2, 0)
    put(state, status="degraded", replicas=replicas("a"))
    put(state, status="ready", replicas=replicas("a", "c"))
    assert value("millrace_runner_restarts_total") == 1
    put(state, generation=2, status="ready", replicas=replicas("a", "c", "d"))
    assert value("millrace_runner_restarts_total") == 1


def test_copies_that_replicas_found_damaged_are_counted_once():
    metrics = Metrics()
    measures = DamageMetrics(metrics)

    def counted():
        named = {sample.labels: sample.value for sample in metrics.samples() if sample.metric.name == "millrace_damaged_copies_total"}
        return named["serving", "artifact"], named["serving", "environment"]

    def look(*damage: Damage):
        measures.look([ActualDeployment(1, "", 1, AppStatus.RUNNING, damage=damage), ActualDeployment(1, "", 1, AppStatus.RUNNING)])

    look(Damage("before", 5, 0))
    assert counted() == (0, 0)
    look(Damage("before", 6, 0), Damage("a", 1, 1))
    look(Damage("before", 6, 0), Damage("a", 1, 1))
    assert counted() == (2, 1)
    look(Damage("a", 3, 1))
    look(Damage("before", 6, 0), Damage("a", 3, 1))
    assert counted() == (4, 1)
