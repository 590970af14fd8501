"""The artifact store: one interface, content-addressed by SHA-256, over a directory or an S3 bucket."""

from libs.artifacts.directory import DirectoryStore
from libs.artifacts.factory import from_settings
from libs.artifacts.memory import MemoryStore
from libs.artifacts.store import (
    ArtifactCorruptError,
    ArtifactNotFoundError,
    ArtifactStore,
    ArtifactStoreUnavailableError,
    ArtifactTooLargeError,
    DigestMismatchError,
    StoredArtifact,
)

__all__ = [
    "ArtifactCorruptError",
    "ArtifactNotFoundError",
    "ArtifactStore",
    "ArtifactStoreUnavailableError",
    "ArtifactTooLargeError",
    "DigestMismatchError",
    "DirectoryStore",
    "MemoryStore",
    "StoredArtifact",
    "from_settings",
]
