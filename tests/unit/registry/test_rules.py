"""The registry's rules, without a log."""

from datetime import UTC, datetime

import pytest

from schemas.artifacts import FileSet
from schemas.base import Fact
from schemas.environment import EnvironmentLock, VersionBuildFailed, VersionBuilt
from schemas.inference import Datatype, DeclaredSignature, Signature, TensorSpec
from schemas.registry import (
    AliasSet,
    ArchiveVersion,
    Artifact,
    CreateEndpoint,
    DeleteEndpoint,
    DeploymentStatus,
    DeployVersion,
    ExampleSet,
    RefusalKind,
    RegisterVersion,
    Replica,
    SetAlias,
    SetExample,
    SetTraffic,
    TrafficChanged,
    UndeployVersion,
    VersionAlreadyRegistered,
    VersionRegistered,
    VersionSpec,
    VersionStatus,
)
from schemas.serving import DeploymentChanged, DeploymentFailed, DeploymentReady, DeploymentRemoved
from schemas.validation import Finding, Measurements, Severity, VersionInspected, VersionNeedsExample, VersionRejected, VersionValidated
from services.registry.errors import RefusedError
from services.registry.handlers import COMMAND_RULES, OUTCOME_RULES
from services.registry.state import Context, State

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONTEXT = Context(NOW, "story")
SIGNATURE = Signature(
    inputs=(TensorSpec(name="input", datatype=Datatype.FP64, shape=(-1, 4)),),
    outputs=(TensorSpec(name="predict", datatype=Datatype.INT64, shape=(-1,)),),
)
LOCK = EnvironmentLock(environment_id="0" * 16, python="3.11", platform="x86_64-linux", lock="numpy==2.0.0")


class World:
    """A state with the rules applied to it."""

    def __init__(self) -> None:
        self.state = State()

    def do(self, data) -> tuple[Fact, ...]:
        rule = COMMAND_RULES.get(type(data)) or OUTCOME_RULES[type(data)]
        decision = rule(self.state, data, CONTEXT)
        self.state.apply(decision.changes)
        return decision.facts

    def refused(self, data) -> RefusedError:
        with pytest.raises(RefusedError) as caught:
            self.do(data)
        return caught.value

    def register(self, model="iris", content="a", **spec) -> int:
        (fact, *_) = self.do(RegisterVersion(model_name=model, spec=_spec(content, **spec)))
        return fact.version

    def validate(self, model="iris", version=1) -> None:
        self.do(VersionInspected(model_name=model, version=version, format="sklearn", requirements=("scikit-learn",), inferred=True))
        self.do(VersionBuilt(model_name=model, version=version, environment=LOCK, reused=False, resolve_s=1, install_s=1))
        measured = Measurements(load_s=1, peak_memory_bytes=1)
        self.do(VersionValidated(model_name=model, version=version, signature=SIGNATURE, measurements=measured))

    def wait_for_example(self, model="iris", version=1) -> None:
        self.do(
            VersionInspected(
                model_name=model,
                version=version,
                format="sklearn",
                requirements=(),
                inferred=True,
                findings=(_warning("requirements.missing"),),
            )
        )
        self.do(VersionBuilt(model_name=model, version=version, environment=LOCK, reused=False, resolve_s=1, install_s=1))
        findings = (_warning("trial.no_example"),)
        self.do(VersionNeedsExample(model_name=model, version=version, signature=SIGNATURE, reason="it refused", findings=findings))

    def deploy(self, model="iris", version=1, endpoint="flowers", **options) -> str:
        if endpoint not in self.state.endpoints:
            self.do(CreateEndpoint(endpoint_name=endpoint))
        (fact, *_) = self.do(DeployVersion(endpoint_name=endpoint, model_name=model, version=version, **options))
        return fact.deployment_id

    def ready(self, deployment_id: str) -> tuple[Fact, ...]:
        deployment = self.state.deployments[deployment_id]
        return self.do(
            DeploymentReady(
                endpoint_name=deployment.endpoint_name,
                deployment_id=deployment_id,
                generation=deployment.generation,
                replicas=(Replica(replica_id="r1", address="unix:/r1"),),
            )
        )


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def serving() -> World:
    """iris versions 1 and 2 validated; version 1 ready with all the traffic of endpoint flowers."""
    world = World()
    for content in ("a", "b"):
        world.validate(version=world.register(content=content))
    world.ready(world.deploy())
    return world


def _warning(rule: str) -> Finding:
    return Finding(rule=rule, rule_version=1, severity=Severity.WARN, message="look at this")


def _spec(content="a", **spec) -> VersionSpec:
    return VersionSpec(artifact=Artifact(sha256=content * 64, size_bytes=1, filename="m.joblib"), **spec)


def test_versions_count_up_within_a_model(world):
    assert [world.register(content="a"), world.register(content="b"), world.register("other", "a")] == [1, 2, 1]


def test_the_same_content_again_is_answered_with_the_existing_version(world):
    world.register()
    world.validate()
    facts = world.do(RegisterVersion(model_name="iris", spec=_spec(), aliases=("prod",)))
    assert [type(fact) for fact in facts] == [VersionAlreadyRegistered, AliasSet]
    assert world.state.models["iris"].aliases == {"prod": 1}


def test_aliases_move_when_the_version_is_validated_and_not_before(serving):
    serving.do(SetAlias(model_name="iris", alias="prod", version=1))
    serving.do(RegisterVersion(model_name="iris", spec=_spec("c"), aliases=("prod",)))
    serving.do(RegisterVersion(model_name="iris", spec=_spec("c"), aliases=("next",)))
    assert serving.state.models["iris"].aliases == {"prod": 1}
    serving.validate(version=3)
    assert serving.state.models["iris"].aliases == {"prod": 3, "next": 3}
    assert serving.state.versions["iris@3"].pending_aliases == ()


def test_a_rejected_upload_leaves_the_alias_where_it_was(serving):
    serving.do(SetAlias(model_name="iris", alias="prod", version=1))
    command = RegisterVersion(model_name="iris", spec=_spec("c"), aliases=("prod",))
    serving.do(command)
    serving.do(VersionRejected(model_name="iris", version=3, gate="inspection", reason="it is a text file"))
    assert serving.state.models["iris"].aliases == {"prod": 1}
    assert serving.refused(SetAlias(model_name="iris", alias="prod", version=3)).message == (
        "version 3 of 'iris' is rejected; an alias cannot point at it"
    )


def test_the_same_artifact_with_other_requirements_is_another_version(world):
    assert [world.register(), world.register(requirements=("scikit-learn==1.7",))] == [1, 2]


def test_what_was_refused_without_consent_is_judged_again_with_it(world):
    world.register()
    world.do(VersionRejected(model_name="iris", version=1, gate="inspection", reason="it carries code"))
    assert world.register(allow_code=True) == 2


def test_content_of_an_archived_version_can_be_registered_again(world):
    world.register()
    world.do(ArchiveVersion(model_name="iris", version=1))
    assert world.register() == 2


def test_content_that_could_not_be_built_is_tried_again_as_a_new_version(world):
    world.register()
    world.do(VersionInspected(model_name="iris", version=1, format="sklearn", requirements=("scikit-learn",), inferred=True))
    world.do(VersionBuildFailed(model_name="iris", version=1, reason="the index was asked too often"))
    assert world.register() == 2
    world.validate(version=2)
    assert world.register() == 2


def test_content_that_was_rejected_stays_rejected_until_its_version_is_archived(world):
    world.register()
    world.do(VersionRejected(model_name="iris", version=1, gate="inspection", reason="it is a text file"))
    error = world.refused(RegisterVersion(model_name="iris", spec=_spec()))
    assert (error.kind, error.message) == (
        RefusalKind.CONFLICT,
        "version 1 of 'iris' has the same content and was rejected, which is final: it is a text file; "
        "to have it judged again, first `millrace models archive iris@1`",
    )
    world.do(ArchiveVersion(model_name="iris", version=1))
    assert world.register() == 2


EXAMPLE = {"instances": [[1, 2, 3, 4]]}


def test_a_version_that_needs_an_example_gets_one_and_is_validated(world):
    world.register()
    world.wait_for_example()
    waiting = world.state.versions["iris@1"]
    assert (waiting.status, waiting.reason, waiting.signature) == (VersionStatus.NEEDS_EXAMPLE, "it refused", SIGNATURE)
    facts = world.do(SetExample(model_name="iris", version=1, example=EXAMPLE))
    assert facts == (ExampleSet(model_name="iris", version=1, example=EXAMPLE),)
    measured = Measurements(load_s=1, peak_memory_bytes=1)
    world.do(VersionValidated(model_name="iris", version=1, signature=SIGNATURE, measurements=measured))
    version = world.state.versions["iris@1"]
    assert (version.status, version.reason, version.spec.example) == (VersionStatus.VALIDATED, None, EXAMPLE)
    assert [finding.rule for finding in version.findings] == ["requirements.missing"]
    assert list(version.stage_times) == ["registered", "inspected", "built", "needs_example", "validated"]


@pytest.mark.parametrize("end", ["rejected", "archived"])
def test_a_version_that_needs_an_example_may_end_otherwise(world, end):
    world.register()
    world.wait_for_example()
    if end == "archived":
        world.do(ArchiveVersion(model_name="iris", version=1))
    else:
        world.do(VersionRejected(model_name="iris", version=1, gate="validation", reason="it refuses its example"))
    assert world.state.versions["iris@1"].status == end


@pytest.mark.parametrize("version", [1, None])
def test_a_version_that_needs_an_example_cannot_be_deployed(world, version):
    world.register()
    world.wait_for_example()
    world.do(CreateEndpoint(endpoint_name="flowers"))
    error = world.refused(DeployVersion(endpoint_name="flowers", model_name="iris", version=version))
    assert (error.kind, error.message) == (
        RefusalKind.CONFLICT,
        "version 1 of 'iris' has answered nothing yet and needs an example before it can be deployed: "
        "`millrace models example iris@1 FILE`; it refused",
    )


def test_only_a_version_that_needs_an_example_takes_one(world):
    world.register()
    world.validate()
    error = world.refused(SetExample(model_name="iris", version=1, example=EXAMPLE))
    assert (error.kind, error.message) == (
        RefusalKind.CONFLICT,
        "version 1 of 'iris' is validated; only one that needs an example takes one",
    )


def test_while_an_example_is_tried_only_the_same_may_be_given_again(world):
    world.register()
    world.wait_for_example()
    command = SetExample(model_name="iris", version=1, example=EXAMPLE)
    assert world.do(command) == world.do(command)
    other = SetExample(model_name="iris", version=1, example={"instances": [[0, 0, 0, 0]]})
    assert world.refused(other).message == "version 1 of 'iris' is being tried with another example; wait for the verdict"
    assert world.state.versions["iris@1"].spec.example == EXAMPLE


def test_an_example_that_is_too_large_for_the_state_is_refused(world):
    world.register()
    world.wait_for_example()
    assert world.refused(SetExample(model_name="iris", version=1, example={"csv": "a" * 10_000_000})).kind is RefusalKind.INVALID
    assert world.state.versions["iris@1"].spec.example is None


def test_content_whose_version_waits_brings_it_its_example(world):
    world.register()
    world.wait_for_example()
    facts = world.do(RegisterVersion(model_name="iris", spec=_spec(example=EXAMPLE), aliases=("prod",)))
    assert [type(fact) for fact in facts] == [VersionAlreadyRegistered, ExampleSet]
    version = world.state.versions["iris@1"]
    assert (version.spec.example, version.pending_aliases, version.status) == (EXAMPLE, ("prod",), VersionStatus.NEEDS_EXAMPLE)


@pytest.mark.parametrize(
    "other",
    [
        {"format": "sklearn"},
        {"requirements": ("scikit-learn",)},
        {"allow_code": True},
        {"signature": DeclaredSignature(inputs=SIGNATURE.inputs)},
        {"forbid_batching": True},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_same_artifact_with_other_terms_is_another_version(world, other):
    assert [world.register(), world.register(**other), world.register(**other)] == [1, 2, 2]


def test_what_an_artifact_was_unpacked_to_is_kept_and_deployed(world):
    files = FileSet(sha256="f" * 64, size_bytes=9, files=2, model="m/model.onnx")
    code = FileSet(sha256="c" * 64, size_bytes=3, files=1)
    world.register()
    outcome = VersionInspected(model_name="iris", version=1, format="onnx", requirements=(), inferred=True, files=files, code=code)
    world.do(outcome)
    assert (world.state.versions["iris@1"].files, world.state.versions["iris@1"].code) == (files, code)
    world.validate()
    deployment = world.state.deployments[world.deploy()]
    assert (deployment.files, deployment.code) == (files, code)


def test_the_name_of_a_module_is_part_of_its_code_and_that_of_an_archive_is_not(world):
    def code(filename):
        return Artifact(sha256="c" * 64, size_bytes=1, filename=filename)

    assert [world.register(code=code(name)) for name in ("a.py", "b.py", "a.tar", "b.tar")] == [1, 2, 3, 3]


def test_what_only_describes_a_version_makes_no_other(world):
    world.register()
    world.validate()
    assert [world.register(example=EXAMPLE), world.register(description="again"), world.register(labels={"a": "b"})] == [1, 1, 1]


def test_what_was_rejected_with_one_example_is_judged_again_with_another(world):
    world.register(example={"instances": [["a"]]})
    world.do(VersionRejected(model_name="iris", version=1, gate="validation", reason="the example does not fit the model"))
    assert world.register(example=EXAMPLE) == 2


def test_a_version_lives_from_registered_to_validated(world):
    world.register()
    world.validate()
    version = world.state.versions["iris@1"]
    assert version.status is VersionStatus.VALIDATED
    assert list(version.stage_times) == ["registered", "inspected", "built", "validated"]


def test_an_outcome_that_comes_again_or_too_late_changes_nothing(world):
    world.register()
    world.validate()
    before = world.state.versions["iris@1"]
    world.do(VersionBuildFailed(model_name="iris", version=1, reason="late"))
    world.do(VersionInspected(model_name="iris", version=1, format="onnx", requirements=(), inferred=False))
    world.do(VersionBuildFailed(model_name="unknown", version=1, reason="whose"))
    assert world.state.versions["iris@1"] == before


def test_deploy_of_a_version_that_is_not_built_is_refused_with_its_status(world):
    world.register()
    world.do(CreateEndpoint(endpoint_name="flowers"))
    error = world.refused(DeployVersion(endpoint_name="flowers", model_name="iris", version=1))
    assert (error.kind, error.message) == (
        RefusalKind.CONFLICT,
        "version 1 of 'iris' is registered, and only a validated one can be deployed",
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (DeployVersion(endpoint_name="flowers", model_name="rose"), "there is no model 'rose'"),
        (DeployVersion(endpoint_name="nowhere", model_name="iris"), "there is no endpoint 'nowhere'"),
        (DeployVersion(endpoint_name="flowers", model_name="iris", version=9), "model 'iris' has no version 9; the newest is 2"),
        (DeployVersion(endpoint_name="flowers", model_name="iris", alias="prod"), "model 'iris' has no alias 'prod'"),
        (SetAlias(model_name="iris", alias="prod", version=7), "model 'iris' has no version 7; the newest is 2"),
        (ArchiveVersion(model_name="rose", version=1), "there is no model 'rose'"),
        (DeleteEndpoint(endpoint_name="nowhere"), "there is no endpoint 'nowhere'"),
        (UndeployVersion(endpoint_name="flowers", deployment_id="x"), "endpoint 'flowers' has no deployment 'x'"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(serving, command, message):
    error = serving.refused(command)
    assert (error.kind, error.message) == (RefusalKind.NOT_FOUND, message)


def test_without_version_the_newest_validated_one_is_deployed(serving):
    serving.register(content="c")
    assert serving.deploy(version=None) == "flowers.iris.2"


def test_traffic_moves_when_the_deployment_is_ready_and_not_before(serving):
    deployment_id = serving.deploy(version=2)
    assert serving.state.endpoints["flowers"].traffic == {"flowers.iris.1": 100}
    (fact,) = serving.ready(deployment_id)
    assert fact == TrafficChanged(endpoint_name="flowers", traffic={"flowers.iris.2": 100}, previous={"flowers.iris.1": 100})
    assert serving.state.endpoints["flowers"].traffic == {"flowers.iris.2": 100}


def test_a_newcomer_with_a_share_leaves_the_rest_to_the_others(serving):
    serving.ready(serving.deploy(version=2, traffic_percent=20))
    assert serving.state.endpoints["flowers"].traffic == {"flowers.iris.1": 80, "flowers.iris.2": 20}


def test_deploying_what_is_deployed_again_changes_only_its_share(serving):
    serving.ready(serving.deploy(version=2))
    before = serving.state.deployments["flowers.iris.1"]
    serving.deploy(version=1, traffic_percent=10)
    assert serving.state.deployments["flowers.iris.1"] == before
    assert serving.state.endpoints["flowers"].traffic == {"flowers.iris.1": 10, "flowers.iris.2": 90}


def test_more_replicas_are_a_new_generation_that_keeps_answering(serving):
    serving.deploy(version=1, max_replicas=2, min_replicas=2)
    deployment = serving.state.deployments["flowers.iris.1"]
    assert (deployment.generation, deployment.status, len(deployment.replicas)) == (2, DeploymentStatus.READY, 1)


def test_reports_about_an_older_generation_are_ignored(serving):
    serving.deploy(version=1, max_replicas=2, min_replicas=2)
    serving.do(DeploymentFailed(endpoint_name="flowers", deployment_id="flowers.iris.1", generation=1, reason="old"))
    assert serving.state.deployments["flowers.iris.1"].status is DeploymentStatus.READY


def test_a_deployment_without_enough_replicas_is_degraded_until_they_are_back(serving):
    changed = DeploymentChanged(endpoint_name="flowers", deployment_id="flowers.iris.1", generation=1, replicas=(), reason="runner died")
    serving.do(changed)
    assert serving.state.deployments["flowers.iris.1"].status is DeploymentStatus.DEGRADED
    serving.ready("flowers.iris.1")
    assert serving.state.deployments["flowers.iris.1"].status is DeploymentStatus.READY


def test_a_cluster_that_is_away_is_remembered_until_it_is_back(serving):
    replicas = serving.state.deployments["flowers.iris.1"].replicas
    said = {"endpoint_name": "flowers", "deployment_id": "flowers.iris.1", "generation": 1, "replicas": replicas}
    serving.do(DeploymentChanged(**said, reason="Ray is away", is_cluster_away=True))
    deployment = serving.state.deployments["flowers.iris.1"]
    assert (deployment.is_cluster_away, deployment.replicas, deployment.reason) == (True, replicas, "Ray is away")
    serving.do(DeploymentChanged(**said))
    assert not serving.state.deployments["flowers.iris.1"].is_cluster_away


def test_delete_of_an_endpoint_under_traffic_is_refused_and_changes_nothing(serving):
    error = serving.refused(DeleteEndpoint(endpoint_name="flowers"))
    assert error.kind is RefusalKind.CONFLICT
    assert "takes traffic (flowers.iris.1 100 %)" in error.message
    assert serving.state.deployments["flowers.iris.1"].status is DeploymentStatus.READY


def test_a_forced_delete_removes_the_deployments_and_they_end_when_serving_says_so(serving):
    serving.do(DeleteEndpoint(endpoint_name="flowers", force=True))
    assert "flowers" not in serving.state.endpoints
    removing = serving.state.deployments["flowers.iris.1"]
    assert (removing.status, removing.generation) == (DeploymentStatus.REMOVING, 2)
    serving.do(DeploymentRemoved(endpoint_name="flowers", deployment_id="flowers.iris.1", generation=2))
    assert not serving.state.deployments


def test_an_endpoint_can_be_made_again_while_its_old_deployment_is_still_being_removed(serving):
    serving.do(DeleteEndpoint(endpoint_name="flowers", force=True))
    serving.deploy(version=1)
    deployment = serving.state.deployments["flowers.iris.1"]
    assert (deployment.status, deployment.generation) == (DeploymentStatus.PENDING, 3)
    serving.do(DeploymentRemoved(endpoint_name="flowers", deployment_id="flowers.iris.1", generation=2))
    assert "flowers.iris.1" in serving.state.deployments


def test_undeploy_under_traffic_needs_force_and_gives_the_share_to_the_others(serving):
    serving.ready(serving.deploy(version=2, traffic_percent=50))
    command = UndeployVersion(endpoint_name="flowers", deployment_id="flowers.iris.2")
    assert "takes 50 % of the traffic" in serving.refused(command).message
    serving.do(command.model_copy(update={"force": True}))
    endpoint = serving.state.endpoints["flowers"]
    assert (endpoint.traffic, endpoint.deployment_ids) == ({"flowers.iris.1": 100}, ("flowers.iris.1",))


def test_a_split_must_sum_to_100_and_name_deployments_that_answer(serving):
    serving.deploy(version=2)
    assert "must sum to 100, not 90" in serving.refused(SetTraffic(endpoint_name="flowers", traffic={"flowers.iris.1": 90})).message
    pending = SetTraffic(endpoint_name="flowers", traffic={"flowers.iris.1": 50, "flowers.iris.2": 50})
    assert serving.refused(pending).message == "deployment 'flowers.iris.2' is pending; it cannot take traffic"
    unknown = SetTraffic(endpoint_name="flowers", traffic={"flowers.iris.9": 100})
    assert serving.refused(unknown).kind is RefusalKind.NOT_FOUND


def test_an_endpoint_that_names_a_deployment_nobody_knows_can_still_be_split_and_deleted(serving):
    ghost = serving.state.endpoints["flowers"].model_copy(update={"deployment_ids": ("flowers.iris.1", "flowers.ghost.1")})
    serving.state.apply([ghost])
    assert serving.refused(SetTraffic(endpoint_name="flowers", traffic={"flowers.ghost.1": 100})).kind is RefusalKind.NOT_FOUND
    serving.do(DeleteEndpoint(endpoint_name="flowers", force=True))
    assert "flowers" not in serving.state.endpoints


def test_a_deployed_version_cannot_be_archived(serving):
    error = serving.refused(ArchiveVersion(model_name="iris", version=1))
    assert error.message == "version 1 of 'iris' is deployed to flowers; undeploy it first"


def test_archiving_takes_the_aliases_away(serving):
    serving.do(SetAlias(model_name="iris", alias="prod", version=2))
    serving.do(ArchiveVersion(model_name="iris", version=2))
    assert serving.state.models["iris"].aliases == {}


def test_register_announces_the_version_with_everything_the_validator_needs(world):
    spec = _spec(requirements=("scikit-learn",), example={"instances": [[1, 2, 3, 4]]})
    (fact,) = world.do(RegisterVersion(model_name="iris", spec=spec))
    assert fact == VersionRegistered(model_name="iris", version=1, spec=spec)


def test_creating_an_endpoint_twice_is_the_same_endpoint_unless_it_differs(world):
    world.do(CreateEndpoint(endpoint_name="flowers"))
    world.do(CreateEndpoint(endpoint_name="flowers"))
    assert world.refused(CreateEndpoint(endpoint_name="flowers", description="other")).kind is RefusalKind.CONFLICT
