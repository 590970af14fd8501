"""What a replica is told to run: plain data, because it crosses to Ray's workers."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from schemas.artifacts import FileSet
from schemas.base import Contract, Sha256
from schemas.environment import EnvironmentLock
from schemas.inference import Signature
from schemas.registry import ArtifactFormat, DeploymentSnapshot


class Places(Contract):
    """Where the machines that run replicas find things; the same on each of them.

    ``listen`` is ``unix`` when the gateways are on the replica's machine, else ``tcp``. The runner key is read where the replica
    runs, so that the secret does not travel.
    """

    artifacts_url: str = Field(description="file:///directory or s3://bucket[/prefix]; S3 credentials come from ARTIFACTS_*.")
    artifact_cache_dir: Path = Field(description="Artifacts that were fetched, files and folders of files, named by digest.")
    environments_dir: Path = Field(description="Directory of the content-addressed environments.")
    runner_key_file: Path = Field(description="File with the platform's runner key.")
    listen: Literal["unix", "tcp"] = "unix"


class Limits(Contract):
    """What a served model may use."""

    threads: int = Field(default=1, ge=1, description="Threads of the numeric libraries.")
    memory_bytes: int | None = Field(default=None, description="What the model may allocate; None: no limit.")
    file_size_bytes: int = Field(default=2**30, ge=2**20, description="Largest file the model may write, its log included.")
    start_timeout_s: float = Field(default=60.0, gt=0, description="Longest time until the model is loaded, in seconds.")
    predict_timeout_s: float = Field(default=30.0, gt=0, description="A runner that is busy with one request for longer is replaced.")


class ReplicaSpec(Contract):
    """What one replica runs, and within which limits."""

    deployment_id: str
    model_name: str
    version: int
    artifact_sha256: Sha256
    files: FileSet | None = None
    code: FileSet | None = None
    format: ArtifactFormat
    environment: EnvironmentLock
    signature: Signature
    places: Places
    limits: Limits = Limits()

    @property
    def digest(self) -> str:
        """Equal for equal specs; 16 hexadecimal digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def replica_spec(snapshot: DeploymentSnapshot, places: Places, limits: Limits) -> ReplicaSpec:
    """What the replicas of a deployment run; its generation and how many they are is no part of it."""
    return ReplicaSpec(
        deployment_id=snapshot.deployment_id,
        model_name=snapshot.model_name,
        version=snapshot.version,
        artifact_sha256=snapshot.artifact.sha256,
        files=snapshot.files,
        code=snapshot.code,
        format=snapshot.format,
        environment=snapshot.environment,
        signature=snapshot.signature,
        places=places,
        limits=limits,
    )
