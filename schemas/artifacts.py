"""Sets of files in the artifact store."""

from pydantic import Field

from schemas.base import Contract, Sha256


class FileSet(Contract):
    """Files in the artifact store that belong together, addressed by their manifest.

    The manifest is canonical JSON, ``{"files":[{"path":…,"sha256":…,"size_bytes":…},…]}`` sorted by path, and lies in the store itself, as
    each of the files does.
    """

    sha256: Sha256 = Field(description="SHA-256 of the manifest, lower-case hex.")
    size_bytes: int = Field(ge=0, description="Size of all files together, in bytes.")
    files: int = Field(ge=1, le=10_000, description="How many files there are.")
    model: str | None = Field(
        default=None, max_length=1024, description="Path of the model's own file; null where none of them is a model."
    )
