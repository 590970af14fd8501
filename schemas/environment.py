"""What the builder says: the reproducible environment of a version."""

from pydantic import Field

from schemas.base import Contract, Fact, Name, VersionNumber


class EnvironmentLock(Contract):
    """A pinned, hashed set of packages for one Python on one platform; its id is a digest of all three.

    Equal ids mean equal environments, so versions with equal locks share one.
    """

    environment_id: str = Field(pattern=r"^[0-9a-f]{16,64}$")
    python: str = Field(pattern=r"^3\.\d+$", description="Minor version of the interpreter, e.g. 3.11.")
    platform: str = Field(description="Platform the lock was resolved for, e.g. x86_64-linux.")
    lock: str = Field(max_length=524_288, description="Pinned requirements with hashes (pip's format).")


class VersionBuilt(Fact):
    """The environment of a version exists; the validator tries the version in it next."""

    event_type = "millrace.builder.version.built.v1"
    model_name: Name
    version: VersionNumber
    environment: EnvironmentLock
    reused: bool = Field(description="True when an equal environment existed already.")
    resolve_s: float = Field(ge=0)
    install_s: float = Field(ge=0)

    @property
    def entity(self) -> str:
        return self.model_name


class VersionBuildFailed(Fact):
    """No environment can be built for a version; the end of its life."""

    event_type = "millrace.builder.version.build_failed.v1"
    model_name: Name
    version: VersionNumber
    reason: str
    evidence: str = Field(default="", max_length=16_384, description="The resolver's own words, shortened.")

    @property
    def entity(self) -> str:
        return self.model_name
