"""From a URL to a store."""

from pathlib import Path
from urllib.parse import unquote

from libs.artifacts.directory import DirectoryStore
from libs.artifacts.store import ArtifactStore
from libs.errors import ConfigurationError
from libs.settings import ArtifactSettings


def from_settings(settings: ArtifactSettings) -> ArtifactStore:
    """The store that ``settings.url`` names: ``file:///directory`` (or ``file://relative/directory``) or ``s3://bucket[/prefix]``.

    Nothing is opened or created yet.

    Raises
    ------
    ConfigurationError
        The URL has another scheme or names no place, or what an S3 server needs is missing.
    """
    scheme, separator, place = settings.url.partition("://")
    if not separator or not place.strip("/"):
        raise ConfigurationError(f"The artifact store {settings.url!r} is neither file:///directory nor s3://bucket/prefix.")
    match scheme:
        case "file":
            return DirectoryStore(Path(unquote(place)))
        case "s3":
            return _s3_store(place, settings)
        case _:
            raise ConfigurationError(f"The artifact store {settings.url!r} has the unknown scheme {scheme!r}; use file or s3.")


def _s3_store(place: str, settings: ArtifactSettings) -> ArtifactStore:
    from libs.artifacts.s3 import (
        Bucket,
        S3Store,
        s3_client,
    )  # imports the S3 client (0.2 s), which a directory does not need

    if not settings.s3_access_key or not settings.s3_secret_key:
        raise ConfigurationError(f"The artifact store {settings.url!r} needs an access key and a secret key.")
    bucket, _, prefix = place.partition("/")
    client = s3_client(
        settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com",
        settings.s3_region,
        settings.s3_access_key.get_secret_value(),
        settings.s3_secret_key.get_secret_value(),
    )
    return S3Store(client, Bucket(bucket, prefix.strip("/")))
