"""What only a real S3 server shows; what every store does is in ``tests/contract/test_artifact_store.py``."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from minio import Minio
from pydantic import SecretStr

from libs.artifacts import ArtifactStore, ArtifactStoreUnavailableError, from_settings
from libs.artifacts.s3 import PART_BYTES, Bucket, S3Store, s3_client
from libs.errors import ConfigurationError
from libs.settings import ArtifactSettings
from tests.integration.servers import S3Server, run_s3, s3_server  # noqa: F401 (a fixture)

pytestmark = pytest.mark.integration

CONTENT = bytes(4 * PART_BYTES)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MAX_BYTES = 1 << 30


@pytest.fixture
def client(s3_server: S3Server) -> Minio:  # noqa: F811
    return s3_client(s3_server.endpoint, s3_server.region, s3_server.access_key, s3_server.secret_key)


@pytest.fixture
def bucket(client: Minio, tmp_path: Path) -> str:
    name = tmp_path.name.replace("_", "-").lower()[:60].strip("-")
    client.make_bucket(name)
    return name


async def _content() -> AsyncIterator[bytes]:
    yield CONTENT


def _store(server: S3Server, url: str, *, secret: str | None = None, endpoint: str | None = None) -> ArtifactStore:
    return from_settings(
        ArtifactSettings(
            url=url,
            s3_endpoint=endpoint or server.endpoint,
            s3_access_key=SecretStr(server.access_key),
            s3_secret_key=SecretStr(secret or server.secret_key),
        )
    )


async def test_settings_make_a_store_that_works(s3_server: S3Server, bucket: str) -> None:  # noqa: F811
    store = _store(s3_server, f"s3://{bucket}/models")
    stored = await store.put(_content(), max_bytes=MAX_BYTES)
    assert stored.uri == f"s3://{bucket}/models/sha256/{SHA256[:2]}/{SHA256[2:]}"
    assert await store.stat(SHA256) == stored


async def test_an_upload_cancelled_half_way_is_aborted_on_the_server(client: Minio, bucket: str) -> None:
    half_way, go_on = threading.Event(), threading.Event()

    class Halting(Minio):
        def _upload_part(self, *arguments: object) -> str:
            if arguments[-1] == 3:
                half_way.set()
                go_on.wait(10)
            return str(super()._upload_part(*arguments))

    client.__class__ = Halting
    store = S3Store(client, Bucket(bucket))
    upload = asyncio.create_task(store.put(_content(), max_bytes=MAX_BYTES))
    await asyncio.to_thread(half_way.wait, 10)
    assert len(client._list_multipart_uploads(bucket).uploads) == 1
    upload.cancel()
    asyncio.get_running_loop().call_soon(go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert client._list_multipart_uploads(bucket).uploads == []
    assert not await store.exists(SHA256)


async def test_content_that_is_there_is_not_sent_again(client: Minio, bucket: str) -> None:
    store = S3Store(client, Bucket(bucket))
    await store.put(_content(), max_bytes=MAX_BYTES)
    before = client.stat_object(bucket, Bucket(bucket).key(SHA256)).etag

    class Refusing(Minio):
        def put_object(self, *_: object, **__: object) -> object:
            raise AssertionError("sent again")

    client.__class__ = Refusing
    await store.put(_content(), max_bytes=MAX_BYTES)
    assert client.stat_object(bucket, Bucket(bucket).key(SHA256)).etag == before


async def test_a_bucket_that_is_not_there_is_a_matter_of_configuration(s3_server: S3Server) -> None:  # noqa: F811
    with pytest.raises(ConfigurationError, match="no-such-bucket: NoSuchBucket"):
        await _store(s3_server, "s3://no-such-bucket").put(_content(), max_bytes=MAX_BYTES)


async def test_a_wrong_secret_is_a_matter_of_configuration(s3_server: S3Server, bucket: str) -> None:  # noqa: F811
    with pytest.raises(ConfigurationError, match="refuses the bucket") as caught:
        await _store(s3_server, f"s3://{bucket}", secret="not-the-secret").put(_content(), max_bytes=MAX_BYTES)
    assert "not-the-secret" not in str(caught.value)


async def test_a_server_that_is_gone_can_be_tried_again(tmp_path: Path) -> None:
    with run_s3(tmp_path) as server:
        store = _store(server, "s3://bucket")
    with pytest.raises(ArtifactStoreUnavailableError, match="cannot be reached"):
        await store.stat(SHA256)
