"""Artifacts in a bucket of any server that speaks the S3 protocol."""

import os
import tempfile
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, cast

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, S3Error, ServerError

from libs.artifacts.store import (
    ArtifactNotFoundError,
    ArtifactStoreUnavailableError,
    BlockReader,
    StoredArtifact,
    in_thread,
    key_of,
    os_errors_of,
    read_verified,
    receive,
    write_verified,
)
from libs.errors import ConfigurationError

PART_BYTES = 8 << 20
"""One part of an upload. The client holds a part about twice, and 10 000 parts (the protocol's limit) make 80 GB."""

SPOOL_IN_MEMORY_BYTES = 4 << 20
"""Uploads up to this size never touch the local disk."""

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
_ATTEMPTS = 4

_REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket", "PermanentRedirect"})


@dataclass(frozen=True, slots=True)
class Bucket:
    """A place in an S3 server: a bucket that exists, and a prefix of keys in it (no slash at its ends; may be empty)."""

    name: str
    prefix: str = ""

    def key(self, sha256: str) -> str:
        return f"{self.prefix}/{key_of(sha256)}" if self.prefix else key_of(sha256)

    def uri(self, sha256: str) -> str:
        return f"s3://{self.name}/{self.key(sha256)}"


class S3Store:
    """Artifacts as objects ``<prefix>/sha256/ab/cdef…``.

    The key is the digest, known only at the end of an upload, and S3 cannot rename. So an upload is first spooled to an unnamed temporary
    file on the local disk, checked, and then sent in parts to its final key, where it appears at once when the last part is confirmed.
    The alternative, a temporary key and a copy on the server, needs no local disk but sends refused uploads all the way, leaves
    temporary objects when a process is killed, and depends on each server's copy (at most 5 GiB at once).

    A failed or cancelled upload is aborted on the server. A process that is killed while it sends leaves invisible parts: give the bucket a
    life-cycle rule that aborts incomplete multipart uploads after a day.

    Parameters
    ----------
    client
        A ``minio`` client; ``s3_client`` makes one with bounded waits.
    bucket
        Where the artifacts lie; it must exist.
    spool_directory
        Where uploads over ``SPOOL_IN_MEMORY_BYTES`` are spooled; needs room for the largest of them.
        By default ``/var/tmp``, else the system's temporary directory.
    """

    def __init__(self, client: Minio, bucket: Bucket, spool_directory: Path | None = None) -> None:
        self._client = client
        self._bucket = bucket
        self._spool_directory = spool_directory or _disk_directory()

    async def put(self, chunks: AsyncIterable[bytes], *, expected_sha256: str | None = None, max_bytes: int) -> StoredArtifact:
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_IN_MEMORY_BYTES, dir=str(self._spool_directory)) as spool:
            sha256, size_bytes = await receive(chunks, partial(self._spool, spool), expected_sha256=expected_sha256, max_bytes=max_bytes)
            upload = _Upload(spool)
            await in_thread(self._send, upload, sha256, size_bytes, on_cancel=upload.cancel)
        return StoredArtifact(sha256, size_bytes, self._bucket.uri(sha256))

    def open(self, sha256: str) -> AsyncIterator[bytes]:
        key = self._bucket.key(sha256)
        return read_verified(lambda: self._download(key, sha256), sha256)

    async def stat(self, sha256: str) -> StoredArtifact:
        return await in_thread(self._stat, sha256)

    async def exists(self, sha256: str) -> bool:
        try:
            await self.stat(sha256)
        except ArtifactNotFoundError:
            return False
        return True

    async def fetch_to(self, sha256: str, path: Path) -> None:
        await write_verified(self.open(sha256), path)

    async def delete(self, sha256: str) -> None:
        await in_thread(self._delete, sha256)

    def _spool(self, spool: IO[bytes], block: bytes) -> None:
        with os_errors_of(f"the temporary directory {self._spool_directory}"):
            spool.write(block)

    def _send(self, upload: "_Upload", sha256: str, size_bytes: int) -> None:
        if self._is_stored(sha256, size_bytes):
            return
        upload.rewind()
        with self._translated(sha256):
            self._client.put_object(
                self._bucket.name,
                self._bucket.key(sha256),
                cast(BinaryIO, upload),
                size_bytes,
                part_size=PART_BYTES,
                num_parallel_uploads=1,
            )

    def _is_stored(self, sha256: str, size_bytes: int) -> bool:
        try:
            return self._stat(sha256).size_bytes == size_bytes
        except ArtifactNotFoundError:
            return False

    def _download(self, key: str, sha256: str) -> BlockReader:
        with self._translated(sha256):
            return _Download(self._client.get_object(self._bucket.name, key))

    def _stat(self, sha256: str) -> StoredArtifact:
        with self._translated(sha256):
            found = self._client.stat_object(self._bucket.name, self._bucket.key(sha256))
        return StoredArtifact(sha256, found.size or 0, self._bucket.uri(sha256))

    def _delete(self, sha256: str) -> None:
        with self._translated(sha256):
            self._client.remove_object(self._bucket.name, self._bucket.key(sha256))

    @contextmanager
    def _translated(self, sha256: str) -> Iterator[None]:
        try:
            yield
        except S3Error as error:
            if error.code == "NoSuchKey":
                raise ArtifactNotFoundError(f"There is no artifact {sha256}.") from error
            if error.code in _REFUSED:
                raise ConfigurationError(f"The S3 server refuses the bucket {self._bucket.name}: {error.code}.") from error
            raise ArtifactStoreUnavailableError(f"The S3 server failed: {error.code}, {error.message}.") from error
        except (ServerError, InvalidResponseError, urllib3.exceptions.HTTPError) as error:
            raise ArtifactStoreUnavailableError(f"The S3 server cannot be reached or failed: {error}.") from error


class _Upload:
    """What the client reads an upload from; reading fails once the upload was cancelled, and then the client aborts it on the server."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def rewind(self) -> None:
        self._spool.seek(0)

    def read(self, size: int) -> bytes:
        if self._cancelled.is_set():
            raise ArtifactStoreUnavailableError("The upload was cancelled.")
        return self._spool.read(size)


class _Download:
    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def read(self, size: int, /) -> bytes:
        try:
            return self._response.read(size)
        except urllib3.exceptions.HTTPError as error:
            raise ArtifactStoreUnavailableError(f"The S3 server broke off an artifact: {error}.") from error

    def close(self) -> None:
        self._response.close()
        self._response.release_conn()


def s3_client(endpoint: str, region: str, access_key: str, secret_key: str) -> Minio:
    """A client with bounded waits and retries.

    Raises
    ------
    ConfigurationError
        The endpoint is not ``http://host[:port]`` or ``https://host[:port]``.
    """
    parts = urllib3.util.parse_url(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or (parts.path or "/") != "/":
        raise ConfigurationError(f"The S3 endpoint {endpoint!r} is not http://host:port or https://host:port.")
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_READ_TIMEOUT_S),
        maxsize=10,
        cert_reqs="CERT_REQUIRED",
        retries=urllib3.Retry(total=_ATTEMPTS - 1, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504)),
    )
    return Minio(
        parts.netloc,
        access_key=access_key,
        secret_key=secret_key,
        secure=parts.scheme == "https",
        region=region,
        http_client=pool,
    )


def _disk_directory() -> Path:
    """Where temporary files are on a disk; ``/tmp`` is memory on many machines."""
    on_disk = Path("/var/tmp")  # noqa: S108 (files made there have unguessable names, are private and unlinked at once)
    return on_disk if os.access(on_disk, os.W_OK) else Path(tempfile.gettempdir())
