"""Triton's statistics of deployments: how many requests and executions there were, and what they took.

The time of a request with success, from its acceptance to its end, has four parts: its body is read into tensors (``compute_input``), it
waits (``queue``), the model is busy with its batch (``compute_infer``, as the runner measures it), and what is left (``compute_output``):
the way to the runner and back, the waits between the pieces of a large request, and the writing of the answer. Of an execution only the
time in the model is measured.

References
----------
Triton, "Statistics extension"
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.registry import DeploymentSnapshot
from services.gateway.catalog import Catalog
from services.gateway.doors.headers import target_of
from services.gateway.exchange import Incoming, Outgoing, json_answer
from services.gateway.prediction_log import Rows
from services.gateway.predictions import Handler

MOST_SIZES = 1024
"""Sizes of batches that are told of for each deployment; executions of further ones are counted without their size."""

Document = dict[str, Any]
"""Statistics as JSON values, in the words of Triton, but for ``batch_stats``: by size the executions and nanoseconds in the model."""

_PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
_NONE = {"count": 0, "ns": 0}


class Statistics:
    """What is counted of one deployment by one process."""

    def __init__(self) -> None:
        self._parts = {part: [0, 0.0] for part in _PARTS}
        self._rows = 0
        self._executions = 0
        self._last_ms = 0
        self._sizes: dict[int, list[float]] = {}

    def count_requests(self, rows: Rows, wall_minus_clock_s: float) -> None:
        """Count requests that have ended."""
        is_good = rows["outcome"] == 0
        good, bad = rows[is_good], rows[~is_good]
        self._add("success", good["ended_s"] - good["accepted_s"])
        self._add("fail", bad["ended_s"] - bad["accepted_s"])
        self._add("compute_input", good["queued_s"] - good["accepted_s"])
        self._add("queue", good["sent_s"] - good["queued_s"])
        self._add("compute_infer", good["model_s"])
        self._add("compute_output", good["ended_s"] - good["sent_s"] - good["model_s"])
        self._rows += int(good["rows"].sum())
        if len(rows):
            self._last_ms = max(self._last_ms, int((rows["accepted_s"].max() + wall_minus_clock_s) * 1000))

    def count_executions(self, rows: npt.NDArray[np.float64], model_s: npt.NDArray[np.float64]) -> None:
        """Count batches that were answered: the rows of each, and the seconds that the model took."""
        self._executions += len(rows)
        sizes, places = np.unique(rows.astype(np.int64), return_inverse=True)
        counts, seconds = np.bincount(places), np.bincount(places, model_s)
        for size, count, took_s in zip(sizes.tolist(), counts.tolist(), seconds.tolist(), strict=True):
            if size in self._sizes or len(self._sizes) < MOST_SIZES:
                known = self._sizes.setdefault(size, [0, 0.0])
                known[0] += count
                known[1] += took_s

    def document(self) -> Document:
        """All of it as it is now."""
        return {
            "last_inference": self._last_ms,
            "inference_count": self._rows,
            "execution_count": self._executions,
            "inference_stats": {part: {"count": count, "ns": round(1e9 * seconds)} for part, (count, seconds) in self._parts.items()},
            "batch_stats": {str(size): [count, round(1e9 * seconds)] for size, (count, seconds) in self._sizes.items()},
        }

    def _add(self, part: str, seconds: npt.NDArray[np.float64]) -> None:
        self._parts[part][0] += len(seconds)
        self._parts[part][1] += float(np.maximum(seconds, 0.0).sum())


class StatisticsDoor:
    """Tells the statistics of all processes of the gateway together.

    Parameters
    ----------
    own
        What this process has counted, by deployment id.
    others
        The same of the other processes, each for itself.
    """

    def __init__(
        self, catalog: Catalog, own: Callable[[], Mapping[str, Document]], others: Callable[[], Iterable[Mapping[str, Document]]]
    ) -> None:
        self._catalog = catalog
        self._own = own
        self._others = others

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """Handler by method and route template."""
        return {
            ("GET", "/v2/models/stats"): self.all,
            ("GET", "/v2/models/{model}/stats"): self.model,
            ("GET", "/v2/models/{model}/versions/{version}/stats"): self.model,
        }

    async def all(self, _incoming: Incoming) -> Outgoing:
        """Every version at every endpoint."""
        routing = self._catalog.routing
        return self._told({name: routing.deployments_of(name) for name in routing.endpoint_names()})

    async def model(self, incoming: Incoming) -> Outgoing:
        """Every version at an endpoint, or one."""
        target, routing = target_of(incoming), self._catalog.routing
        name = target.endpoint_name
        is_named = target.version is not None or target.alias is not None
        return self._told({name: routing.named(name, target.version, target.alias) if is_named else routing.deployments_of(name)})

    def _told(self, deployments: Mapping[str, list[DeploymentSnapshot]]) -> Outgoing:
        processes = [self._own(), *self._others()]
        stats = [
            {"name": name, "version": str(deployment.version), **together([each.get(deployment.deployment_id) for each in processes])}
            for name, deployed in deployments.items()
            for deployment in deployed
        ]
        return json_answer({"model_stats": stats})


def together(documents: Iterable[Document | None]) -> Document:
    """What several processes have counted of one deployment, as Triton tells it.

    Examples
    --------
    >>> told = together([Statistics().document(), None])
    >>> told["execution_count"], told["inference_stats"]["success"], told["batch_stats"]
    (0, {'count': 0, 'ns': 0}, [])
    """
    counted = [document for document in documents if document is not None]
    sizes: dict[int, list[int]] = {}
    for document in counted:
        for size, (count, ns) in document["batch_stats"].items():
            known = sizes.setdefault(int(size), [0, 0])
            known[0] += count
            known[1] += ns
    parts = {part: {of: sum(document["inference_stats"][part][of] for document in counted) for of in ("count", "ns")} for part in _PARTS}
    return {
        "last_inference": max((document["last_inference"] for document in counted), default=0),
        "inference_count": sum(document["inference_count"] for document in counted),
        "execution_count": sum(document["execution_count"] for document in counted),
        "inference_stats": {**parts, "cache_hit": _NONE, "cache_miss": _NONE},
        "batch_stats": [
            {"batch_size": size, "compute_input": _NONE, "compute_infer": {"count": count, "ns": ns}, "compute_output": _NONE}
            for size, (count, ns) in sorted(sizes.items())
        ],
    }
