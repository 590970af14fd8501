"""The gateway's HTTP server: an asyncio protocol on httptools, with limits, deadlines and strict framing.

An application (``Application``) sees exchanges (``Exchange``); what happens on the wire is decided here. See ``docs/http-limits.md``.
"""

from services.gateway.http.connections import Connections
from services.gateway.http.exchange import Application, AsgiApp, Exchange, Header
from services.gateway.http.heads import Head, RefusedError

__all__ = ["Application", "AsgiApp", "Connections", "Exchange", "Head", "Header", "RefusedError"]
