from pathlib import Path

import pytest
from pydantic import SecretStr

from libs.artifacts import DirectoryStore, from_settings
from libs.artifacts.s3 import S3Store
from libs.errors import ConfigurationError
from libs.settings import ArtifactSettings

KEYS = {"s3_access_key": SecretStr("key"), "s3_secret_key": SecretStr("secret")}


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    assert isinstance(from_settings(ArtifactSettings(url=f"file://{tmp_path}")), DirectoryStore)


def test_an_s3_url_is_a_bucket() -> None:
    settings = ArtifactSettings(url="s3://bucket/prefix/", s3_endpoint="http://127.0.0.1:9000", **KEYS)
    assert isinstance(from_settings(settings), S3Store)


def test_without_endpoint_s3_is_the_cloud_that_invented_it() -> None:
    assert isinstance(from_settings(ArtifactSettings(url="s3://bucket", **KEYS)), S3Store)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (ArtifactSettings(url="/a/path"), "neither file:///directory nor s3://bucket/prefix"),
        (ArtifactSettings(url="file:///"), "neither file:///directory nor"),
        (ArtifactSettings(url="ftp://host/path"), "unknown scheme 'ftp'"),
        (ArtifactSettings(url="s3://bucket"), "needs an access key and a secret key"),
        (ArtifactSettings(url="s3://bucket", s3_endpoint="host:9000", **KEYS), "'host:9000' is not http://host:port"),
        (ArtifactSettings(url="s3://bucket", s3_endpoint="http://host/path", **KEYS), "'http://host/path' is not http://host:port"),
    ],
)
def test_what_names_no_store_is_refused_at_start(settings: ArtifactSettings, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        from_settings(settings)
