"""Telling a client's server that an operation ended: signed, and only where the operator allows it.

References
----------
Standard Webhooks, specification 1.0: headers ``webhook-id``, ``webhook-timestamp``, ``webhook-signature``
"""

import asyncio
import base64
import fnmatch
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from libs.errors import InvalidArgumentError
from schemas.operations import PredictionEnded

MOST_BODY_BYTES = 64 * 1024
"""A result up to this size is part of the news; a larger one is fetched."""


@dataclass(frozen=True, slots=True)
class WebhookLimits:
    """How often a webhook is tried, and how long each time."""

    attempts: int = 6
    timeout_s: float = 10.0


class Webhooks:
    """Posts the news of ended operations; a component that owns the connections.

    Parameters
    ----------
    hosts
        Patterns of ``host`` or ``host:port`` that may be told, such as ``*.example.org``; none: webhooks are refused, since a caller could
        have the gateway reach what only the gateway can.
    secret
        Key of the signatures.
    """

    def __init__(self, hosts: Sequence[str], secret: bytes, limits: WebhookLimits | None = None) -> None:
        self._hosts = tuple(hosts)
        self._secret = secret
        self._limits = limits or WebhookLimits()
        self._http: httpx.AsyncClient

    async def start(self) -> None:
        self._http = httpx.AsyncClient(timeout=self._limits.timeout_s, follow_redirects=False, trust_env=False)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await self._http.aclose()

    def checked(self, url: str | None) -> str | None:
        """The URL if it may be told.

        Raises
        ------
        InvalidArgumentError
            It is no URL, or the operator does not allow its host.
        """
        if url is None:
            return None
        if not self._hosts or not self._secret:
            raise InvalidArgumentError("webhooks are off here; they need GATEWAY_WEBHOOK_HOSTS and GATEWAY_WEBHOOK_SECRET")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise InvalidArgumentError(f"the webhook {url[:200]!r} is not a URL") from error
        if parts.scheme not in ("http", "https") or not host or parts.username is not None or not url.isascii() or len(url) > 2_000:
            raise InvalidArgumentError(f"the webhook {url[:200]!r} is not an http or https URL without user and password")
        names = (host, f"{host}:{port}") if port is not None else (host,)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self._hosts):
            raise InvalidArgumentError(f"the webhook's host {host!r} is not one of those in GATEWAY_WEBHOOK_HOSTS")
        return url

    @property
    def attempts(self) -> int:
        """How often a webhook is tried."""
        return self._limits.attempts

    async def post(self, ended: PredictionEnded, body: bytes) -> str | None:
        """Post the news once; of what the host answers only the head is read.

        Parameters
        ----------
        body
            Of the answer, if it is to be part of the news.

        Returns
        -------
        str or None
            Why they were not taken (a 2xx); None when they were.

        Raises
        ------
        InvalidArgumentError
            The operator does not allow the host any more.
        """
        url = self.checked(ended.webhook_url) or ""
        content = json.dumps(_news(ended, body)).encode()
        headers = self._headers(ended.operation_id, content)
        try:
            async with asyncio.timeout(self._limits.timeout_s), self._http.stream("POST", url, content=content, headers=headers) as answer:
                return None if answer.is_success else f"the last attempt was answered {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            return f"the last attempt failed: {type(error).__name__}"

    def _headers(self, operation_id: str, content: bytes) -> dict[str, str]:
        timestamp = str(int(time.time()))
        return {
            "content-type": "application/json",
            "webhook-id": operation_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{signature(self._secret, operation_id, timestamp, content)}",
        }


def signature(secret: bytes, webhook_id: str, timestamp: str, content: bytes) -> str:
    """HMAC-SHA256 over ``id.timestamp.content``, in base64."""
    signed = b".".join((webhook_id.encode(), timestamp.encode(), content))
    return base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


def _news(ended: PredictionEnded, body: bytes) -> dict[str, Any]:
    news: dict[str, Any] = {
        "type": f"prediction.{ended.outcome}",
        "operation_id": ended.operation_id,
        "endpoint_name": ended.endpoint_name,
        "http_status": ended.status,
        "result_url": f"/api/v1/predictions/{ended.operation_id}/result",
    }
    if has_result(ended):
        news["result"] = json.loads(body)
    return news


def has_result(ended: PredictionEnded) -> bool:
    """Whether the answer is part of the news of an end."""
    return ended.media_type == "application/json" and ended.body.size_bytes <= MOST_BODY_BYTES and "content-encoding" not in ended.headers


def host_of(url: str) -> str:
    """Host and port of a URL; empty when it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""
