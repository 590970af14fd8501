"""A Ray head for one machine: token-authenticated, every port on loopback, nothing left when it ends.

``python -m libs.local.ray_head --home H`` stays in the foreground until SIGTERM or SIGINT and writes ``H/run/ray.json``
(``{"address": "127.0.0.1:PORT"}``) when a driver can connect. Clients need ``client_environment(home)`` before they import ray.

Two small processes watch each other, so that ``kill -9`` of either leaves no orphan::

    launcher (the foreground process)  ──pipe──►  keeper, leader of a session of its own
                                                    ├── gcs_server
                                                    └── raylet ── agents, Serve's controller, replicas … (same session)

The keeper starts Ray by Ray's own ``Node`` class, then replaces itself by a plain interpreter that only watches (Ray in the
keeper would cost 65 MB for nothing). When the launcher is gone the keeper reads end-of-file; when the keeper is gone the launcher
sees it end; whoever remains stops Ray, kills what is left of the session and removes the session directory. Ray's own
agents would outlive a killed raylet by up to a minute (ray-project/ray ``_private/process_watcher.py``).

``ray start --node-ip-address=127.0.0.1`` cannot be used: it replaces a loopback address by the machine's own
(``resolve_ip_for_localhost`` in ``_private/services.py``) and then listens on every interface.
"""

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LOOPBACK = "127.0.0.1"

LOGICAL_CPUS = 64
"""Ray's scheduling units, not cores: replicas ask for a hundredth each, so that Ray never refuses one for want of CPUs."""

OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Ray's minimum is 75 MiB; tensors do not travel through it. Pages are taken when first used."""

STOP_TIMEOUT_S = 5.0
"""How long Ray gets to end by itself before the session is killed."""

KEPT_LOGS = 3
"""Log directories of earlier runs that are kept."""

_HEAD_SETTINGS = {
    "RAY_enable_metrics_collection": "0",
    "RAY_DASHBOARD_AGENT_LOOP_MONITOR_ENABLED": "0",
    "RAY_event_stats": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_task_events_report_interval_ms": "0",
}


def client_environment(home: Path) -> dict[str, str]:
    """Environment variables that a process needs before it imports ray, to be a driver of the head of ``home``.

    ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` is Ray's switch for "this cluster is one machine": addresses stay 127.0.0.1.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(home)),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def token_path(home: Path) -> Path:
    """Where the head keeps the token that every connection to it must present."""
    return home.absolute() / "secrets" / "ray-token"


def address_path(home: Path) -> Path:
    """The file that says where the head listens; it exists while the head is ready."""
    return home.absolute() / "run" / "ray.json"
