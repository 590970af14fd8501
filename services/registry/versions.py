"""Rules of models, versions and aliases."""

from typing import Any

from pydantic import ValidationError

from schemas.environment import VersionBuildFailed, VersionBuilt
from schemas.registry import (
    AliasSet,
    ArchiveVersion,
    DeploymentStatus,
    ExampleSet,
    ModelSnapshot,
    RegisterVersion,
    SetAlias,
    SetExample,
    VersionAlreadyRegistered,
    VersionArchived,
    VersionRegistered,
    VersionSnapshot,
    VersionSpec,
    VersionStatus,
)
from schemas.validation import Finding, VersionInspected, VersionNeedsExample, VersionRejected, VersionValidated
from services.registry.errors import conflict, invalid
from services.registry.state import Context, Decision, State

TRANSITIONS: dict[VersionStatus, frozenset[VersionStatus]] = {
    VersionStatus.REGISTERED: frozenset({VersionStatus.INSPECTED, VersionStatus.REJECTED, VersionStatus.ARCHIVED}),
    VersionStatus.INSPECTED: frozenset({VersionStatus.BUILT, VersionStatus.BUILD_FAILED, VersionStatus.ARCHIVED}),
    VersionStatus.BUILT: frozenset({VersionStatus.NEEDS_EXAMPLE, VersionStatus.VALIDATED, VersionStatus.REJECTED, VersionStatus.ARCHIVED}),
    VersionStatus.NEEDS_EXAMPLE: frozenset({VersionStatus.VALIDATED, VersionStatus.REJECTED, VersionStatus.ARCHIVED}),
    VersionStatus.VALIDATED: frozenset({VersionStatus.ARCHIVED}),
    VersionStatus.REJECTED: frozenset({VersionStatus.ARCHIVED}),
    VersionStatus.BUILD_FAILED: frozenset({VersionStatus.ARCHIVED}),
    VersionStatus.ARCHIVED: frozenset(),
}
"""The state machine of a version."""


def register(state: State, command: RegisterVersion, context: Context) -> Decision:
    """The next version of a model; content that exists already is answered with the version that has it.

    What could not be built may be buildable later, so the same content is tried again, as a new version. What was rejected stays so. An
    example that comes with content whose version waits for one goes to that version.
    """
    name = command.model_name
    model = state.models.get(name)
    existing = next((version for version in state.versions_of(name) if _same_content(version, command.spec)), None)
    if existing is not None and existing.status is VersionStatus.REJECTED:
        reference = f"{name}@{existing.version}"
        raise conflict(
            f"version {existing.version} of {name!r} has the same content and was rejected, which is final: {existing.reason}; "
            f"to have it judged again, first `millrace models archive {reference}`"
        )
    if model is not None and existing is not None:
        return _registered_again(model, existing, command, context)
    if model is None:
        model = ModelSnapshot(model_name=name, latest_version=0, created_at=context.now, updated_at=context.now)
    number = model.latest_version + 1
    version = VersionSnapshot(
        model_name=name,
        version=number,
        status=VersionStatus.REGISTERED,
        spec=command.spec,
        pending_aliases=command.aliases,
        stage_times={VersionStatus.REGISTERED: context.now},
        correlation_id=context.correlation_id,
        created_at=context.now,
        updated_at=context.now,
    )
    grown = model.model_copy(update={"latest_version": number, "updated_at": context.now})
    return Decision((VersionRegistered(model_name=name, version=number, spec=command.spec),), (version, grown))


def _registered_again(model: ModelSnapshot, version: VersionSnapshot, command: RegisterVersion, context: Context) -> Decision:
    decision = Decision((VersionAlreadyRegistered(model_name=version.model_name, version=version.version),))
    if command.aliases and version.status is VersionStatus.VALIDATED:
        return decision + _aliased(model, command.aliases, version.version, context)
    if command.aliases:
        pending = tuple(dict.fromkeys((*version.pending_aliases, *command.aliases)))
        version = version.model_copy(update={"pending_aliases": pending, "updated_at": context.now})
        decision += Decision(changes=(version,))
    if command.spec.example is not None and version.status is VersionStatus.NEEDS_EXAMPLE:
        decision += _with_example(version, command.spec.example, context)
    return decision


def set_example(state: State, command: SetExample, context: Context) -> Decision:
    """Give an example to a version that needs one; what is said again is tried again."""
    version = state.version(command.model_name, command.version)
    if version.status is not VersionStatus.NEEDS_EXAMPLE:
        raise conflict(f"version {version.version} of {version.model_name!r} is {version.status}; only one that needs an example takes one")
    return _with_example(version, command.example, context)


def _with_example(version: VersionSnapshot, example: dict[str, Any], context: Context) -> Decision:
    if version.spec.example not in (None, example):
        raise conflict(f"version {version.version} of {version.model_name!r} is being tried with another example; wait for the verdict")
    try:
        spec = VersionSpec.model_validate({**dict(version.spec), "example": example})
    except ValidationError as error:
        raise invalid(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
    fact = ExampleSet(model_name=version.model_name, version=version.version, example=example)
    return Decision((fact,), (version.model_copy(update={"spec": spec, "updated_at": context.now}),))


def set_alias(state: State, command: SetAlias, context: Context) -> Decision:
    """Point an alias somewhere else, or remove it."""
    model = state.model(command.model_name)
    if command.version is None:
        if command.alias not in model.aliases:
            return Decision((AliasSet(model_name=command.model_name, alias=command.alias, version=None),))
        aliases = {alias: version for alias, version in model.aliases.items() if alias != command.alias}
        fact = AliasSet(model_name=command.model_name, alias=command.alias, version=None, previous_version=model.aliases[command.alias])
        return Decision((fact,), (model.model_copy(update={"aliases": aliases, "updated_at": context.now}),))
    _check_usable(state.version(command.model_name, command.version))
    return _aliased(model, (command.alias,), command.version, context)


def archive(state: State, command: ArchiveVersion, context: Context) -> Decision:
    """Take a version out of use, unless it is deployed."""
    version = state.version(command.model_name, command.version)
    fact = VersionArchived(model_name=command.model_name, version=command.version)
    if version.status is VersionStatus.ARCHIVED:
        return Decision((fact,))
    deployed = [
        deployment.endpoint_name
        for deployment in state.deployments.values()
        if (deployment.model_name, deployment.version) == (command.model_name, command.version)
        and deployment.status is not DeploymentStatus.REMOVING
    ]
    if deployed:
        raise conflict(
            f"version {command.version} of {command.model_name!r} is deployed to {', '.join(sorted(deployed))}; undeploy it first"
        )
    model = state.model(command.model_name)
    aliases = {alias: number for alias, number in model.aliases.items() if number != command.version}
    return Decision(
        (fact,),
        (
            _moved(version, VersionStatus.ARCHIVED, context),
            model.model_copy(update={"aliases": aliases, "updated_at": context.now}),
        ),
    )


def inspected(state: State, outcome: VersionInspected, context: Context) -> Decision:
    """The artifact passed the first gate."""
    return _outcome(
        state,
        outcome.model_name,
        outcome.version,
        VersionStatus.INSPECTED,
        context,
        format=outcome.format,
        files=outcome.files,
        code=outcome.code,
        requirements=outcome.requirements,
        findings=outcome.findings,
    )


def built(state: State, outcome: VersionBuilt, context: Context) -> Decision:
    """The environment exists."""
    return _outcome(state, outcome.model_name, outcome.version, VersionStatus.BUILT, context, environment=outcome.environment)


def build_failed(state: State, outcome: VersionBuildFailed, context: Context) -> Decision:
    """No environment can be built."""
    return _outcome(state, outcome.model_name, outcome.version, VersionStatus.BUILD_FAILED, context, reason=outcome.reason)


def needs_example(state: State, outcome: VersionNeedsExample, context: Context) -> Decision:
    """The version loads, and has answered nothing yet: it waits for an example."""
    return _outcome(
        state,
        outcome.model_name,
        outcome.version,
        VersionStatus.NEEDS_EXAMPLE,
        context,
        signature=outcome.signature,
        reason=outcome.reason,
        findings=_inspection_findings(state, outcome) + outcome.findings,
    )


def validated(state: State, outcome: VersionValidated, context: Context) -> Decision:
    """The version loads and answers; it can be deployed."""
    found = state.versions.get(f"{outcome.model_name}@{outcome.version}")
    decision = _outcome(
        state,
        outcome.model_name,
        outcome.version,
        VersionStatus.VALIDATED,
        context,
        signature=outcome.signature,
        measurements=outcome.measurements,
        reason=None,
        findings=_inspection_findings(state, outcome) + outcome.findings,
        pending_aliases=(),
    )
    if found is None or not decision.changes:
        return decision
    return decision + _aliased(state.model(outcome.model_name), found.pending_aliases, outcome.version, context)


def rejected(state: State, outcome: VersionRejected, context: Context) -> Decision:
    """One of the two gates said no."""
    return _outcome(
        state,
        outcome.model_name,
        outcome.version,
        VersionStatus.REJECTED,
        context,
        reason=outcome.reason,
        findings=_inspection_findings(state, outcome) + outcome.findings,
    )


def _inspection_findings(state: State, outcome: VersionNeedsExample | VersionValidated | VersionRejected) -> tuple[Finding, ...]:
    """What the first gate found; findings of an earlier trial are replaced by those of the next."""
    found = state.versions.get(f"{outcome.model_name}@{outcome.version}")
    return tuple(finding for finding in found.findings if not finding.rule.startswith("trial.")) if found else ()


def _outcome(state: State, model_name: str, number: int, status: VersionStatus, context: Context, **found: object) -> Decision:
    version = state.versions.get(f"{model_name}@{number}")
    if version is None or status not in TRANSITIONS[version.status]:
        return Decision()  # a repeat, or news of something that has moved on
    return Decision(changes=(_moved(version, status, context, **found),))


def _moved(version: VersionSnapshot, status: VersionStatus, context: Context, **found: object) -> VersionSnapshot:
    update = {"status": status, "updated_at": context.now, "stage_times": {**version.stage_times, status.value: context.now}, **found}
    return VersionSnapshot.model_validate({**dict(version), **update})


def _same_content(version: VersionSnapshot, spec: VersionSpec) -> bool:
    """Whether a spec asks for what a version is already. A rejection is of the example, too: with another one it is no verdict."""
    if version.status in (VersionStatus.BUILD_FAILED, VersionStatus.ARCHIVED):
        return False
    if version.status is VersionStatus.REJECTED and version.spec.example != spec.example:
        return False
    return _identity(version.spec) == _identity(spec)


def _identity(spec: VersionSpec) -> tuple[object, ...]:
    """What makes a version the one that it is; not its example, name of the file, description, labels or lineage.

    The name of a ``.py`` file is that of a module, so it counts.
    """
    code = spec.code and (spec.code.sha256, spec.code.filename if spec.code.filename.endswith(".py") else "")
    return (spec.artifact.sha256, code, spec.allow_code, spec.format, spec.requirements, spec.signature, spec.forbid_batching)


def _check_usable(version: VersionSnapshot) -> None:
    if version.status in (VersionStatus.REJECTED, VersionStatus.BUILD_FAILED, VersionStatus.ARCHIVED):
        raise conflict(f"version {version.version} of {version.model_name!r} is {version.status}; an alias cannot point at it")


def _aliased(model: ModelSnapshot, aliases: tuple[str, ...], number: int, context: Context) -> Decision:
    moved = dict.fromkeys(aliases, number)
    if not moved:
        return Decision()
    facts = tuple(
        AliasSet(model_name=model.model_name, alias=alias, version=number, previous_version=model.aliases.get(alias)) for alias in moved
    )
    return Decision(facts, (model.model_copy(update={"aliases": {**model.aliases, **moved}, "updated_at": context.now}),))
