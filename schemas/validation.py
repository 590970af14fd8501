"""What the validator says at its two gates."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from schemas.artifacts import FileSet
from schemas.base import Contract, Fact, Name, VersionNumber
from schemas.inference import Signature


class Severity(StrEnum):
    """``reject`` ends a version's life; ``warn`` is kept with it."""

    REJECT = "reject"
    WARN = "warn"


class Finding(Contract):
    """One thing a rule found, with the rule and its version, so that the verdict can be re-run."""

    rule: str
    rule_version: int = Field(ge=1)
    severity: Severity
    message: str
    evidence: dict[str, Any] = Field(default_factory=dict)


class Measurements(Contract):
    """What the caged trial run measured."""

    load_s: float = Field(ge=0)
    predict_p50_s: float | None = None
    predict_p99_s: float | None = None
    peak_memory_bytes: int = Field(ge=0)


class VersionInspected(Fact):
    """The artifact is intact and nothing in it forbids going on; nothing of it has run. The builder acts next."""

    event_type = "millrace.validator.version.inspected.v1"
    model_name: Name
    version: VersionNumber
    format: str
    requirements: tuple[str, ...]
    inferred: bool = Field(description="True when the requirements were inferred from the artifact.")
    files: FileSet | None = Field(default=None, description="What the artifact was unpacked to; null when it is one file.")
    code: FileSet | None = Field(default=None, description="The modules that came with it.")
    findings: tuple[Finding, ...] = ()

    @property
    def entity(self) -> str:
        return self.model_name


class VersionValidated(Fact):
    """The version loads and answers, caged, in its own environment; it can be deployed."""

    event_type = "millrace.validator.version.validated.v1"
    model_name: Name
    version: VersionNumber
    signature: Signature
    measurements: Measurements
    golden: dict[str, Any] | None = Field(default=None, description="The example and the answer it got.")
    cage: dict[str, bool] = Field(default_factory=dict, description="Which layers of the cage were active.")
    findings: tuple[Finding, ...] = ()

    @property
    def entity(self) -> str:
        return self.model_name


class VersionNeedsExample(Fact):
    """The version loads, and no prediction has succeeded: without an example it was asked a made-up row, and it refused it.

    It waits for an example (``SetExample``) and cannot be deployed until it has answered one.
    """

    event_type = "millrace.validator.version.needs_example.v1"
    model_name: Name
    version: VersionNumber
    signature: Signature
    reason: str = Field(description="What the model said to the made-up row, one sentence.")
    cage: dict[str, bool] = Field(default_factory=dict, description="Which layers of the cage were active.")
    findings: tuple[Finding, ...] = ()

    @property
    def entity(self) -> str:
        return self.model_name


class Gate(StrEnum):
    """Where a version was rejected: before anything was built, or in the trial run."""

    INSPECTION = "inspection"
    VALIDATION = "validation"


class VersionRejected(Fact):
    """The version will never be deployed, and this is every reason why."""

    event_type = "millrace.validator.version.rejected.v1"
    model_name: Name
    version: VersionNumber
    gate: Gate
    reason: str = Field(description="The gravest finding, one sentence.")
    findings: tuple[Finding, ...] = ()

    @property
    def entity(self) -> str:
        return self.model_name
