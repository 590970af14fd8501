"""Requests of one deployment that are asked of a runner at once. No I/O."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

from libs.errors import MillraceError
from libs.inference import v1, v2
from libs.inference.batches import batch_key as key_of
from libs.inference.batches import is_batchable, join, row_count, whole
from libs.inference.requests import InferRequest
from libs.inference.routing import Route
from libs.runner.wire import Arrays
from schemas.inference import Signature
from services.streaming.errors import InternalError
from services.streaming.log import Given
from services.streaming.requests import Form, Request

log = logging.getLogger(__name__)

T = TypeVar("T")

TARGET_S = 0.05
"""What a batch should take in the model: long enough that what surrounds it does not matter, short enough that a synchronous request that
has to wait for it is not late."""

FIRST = 64
"""So many at once before anything is known."""


class Item:
    """A request on its way to its result.

    Attributes
    ----------
    document
        The JSON body; None for other forms.
    asked
        The tensors, once they had to be made for this request by itself.
    is_plain
        Whether it has nothing but rows, or one V2 tensor and the names of outputs: such requests are made to tensors all at once.
    rows
        How many rows it has, once that is known.
    lost
        Runners that were lost while they were asked this among others, or this alone.
    written
        What goes out for it: its result, and the dead letter of a failed one.
    """

    __slots__ = ("asked", "document", "is_plain", "lost", "outcome", "request", "rows", "span", "written")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.document: dict[str, Any] | None = None
        self.asked: InferRequest | None = None
        self.is_plain = False
        self.rows = 1
        self.lost = 0
        self.outcome = "completed"
        self.span: Any = None
        self.written: list[Given] = []

    @property
    def is_rows(self) -> bool:
        """Whether it is answered in rows."""
        return self.request.form is Form.ROWS

    def read(self) -> None:
        """Find out which form the body has; raises ``InvalidMessage``."""
        if self.request.form is not None:
            return
        self.document = document = self.request.document()
        if len(document) == 1 or (len(document) == 2 and _named_outputs(document)):
            rows = _plain_rows(document)
            self.is_plain, self.rows = rows > 0, rows or 1

    def parse(self, signature: Signature) -> InferRequest:
        """Tensors for a signature; raises ``InvalidMessage`` or ``InvalidInputError``."""
        self.asked = self.request.parse(self.document, signature)
        return self.asked


class Batch:
    """Requests with one route and one shape of a row, as one tensor for each input.

    ``is_plain``: all of its items are, and were read as one.
    """

    __slots__ = ("counts", "inputs", "is_plain", "items", "outputs", "route")

    def __init__(
        self,
        route: Route,
        items: list[Item],
        counts: list[int],
        inputs: Arrays,
        outputs: tuple[str, ...] | None = None,
        *,
        is_plain: bool = False,
    ) -> None:
        self.is_plain = is_plain
        self.route = route
        self.items = items
        self.counts = counts
        self.inputs = inputs
        self.outputs = outputs

    @property
    def rows(self) -> int:
        """Rows of all requests."""
        return sum(self.counts)

    def parts(self, size: int) -> Iterator["Batch"]:
        """The same in batches of ``size`` requests."""
        begin = 0
        for first in range(0, len(self.items), size):
            counts = self.counts[first : first + size]
            end = begin + sum(counts)
            inputs = {name: array[begin:end] for name, array in self.inputs.items()}
            yield Batch(self.route, self.items[first : first + size], counts, inputs, self.outputs, is_plain=self.is_plain)
            begin = end


class Pace:
    """How many at once may cost about so much; found out by doubling and halving.

    Parameters
    ----------
    most
        Never more at once.
    target
        What they may cost: seconds in the model, bytes of results.

    Examples
    --------
    >>> pace = Pace(most=1000, target=0.05)
    >>> pace.cost(64, 0.001)
    >>> pace.count
    128
    >>> pace.cost(128, 0.2)
    >>> pace.count
    64
    """

    def __init__(self, most: int, target: float) -> None:
        self._most = most
        self._target = target
        self.count = min(FIRST, most)

    def cost(self, count: int, cost: float) -> None:
        """Learn from what so many have cost."""
        if cost > self._target:
            self.count = max(1, min(self.count, count) // 2)
        elif count >= self.count and cost < self._target / 2:
            self.count = min(self._most, self.count * 2)


class Grouping:
    """Items sorted into batches; those that do not fit the model are found on the way.

    Attributes
    ----------
    failed
        Items that cannot be asked, with the reason.
    """

    def __init__(self) -> None:
        self.failed: list[tuple[Item, MillraceError]] = []
        self._plain: dict[Any, tuple[Route, list[Item]]] = {}
        self._parsed: dict[Any, tuple[Route, list[Item]]] = {}
        self._alone: list[Batch] = []
        self._batchable: dict[str, bool] = {}

    def add(self, item: Item, route: Route, *, is_alone: bool) -> None:
        """Put an item to those it can be asked with."""
        if is_alone or not self._is_batchable(route):
            asked = self._parse(item, route)
            if asked is not None:
                self._alone.append(Batch(route, [item], [row_count(asked) or 1], asked.inputs, asked.outputs))
        elif item.is_plain:
            self._plain.setdefault((route.deployment_id, *_kind(item)), (route, []))[1].append(item)
        else:
            self._add_parsed(item, route)

    def batches(self, limit: int) -> list[Batch]:
        """Batches of at most ``limit`` rows, or of one request that has more."""
        found: list[Batch] = []
        for route, items in list(self._plain.values()):
            counts = [item.rows for item in items]
            for some, some_counts in _cut(items, counts, limit):
                found += self._joined(route, some, some_counts)
        for route, items in self._parsed.values():
            counts = [item.rows for item in items]
            for some, some_counts in _cut(items, counts, limit):
                found.append(_concatenated(route, some, some_counts))
        return found + self._alone

    def _joined(self, route: Route, items: list[Item], counts: list[int]) -> list[Batch]:
        """Rows of many requests read as those of one, whose elements are independent of each other; if one is wrong, each for itself."""
        try:
            asked = guarded("read", _as_one, items, counts, route.signature)
            return [Batch(route, items, counts, asked.inputs, asked.outputs, is_plain=True)]
        except MillraceError:
            for item in items:
                self._add_parsed(item, route)
            return []

    def _add_parsed(self, item: Item, route: Route) -> None:
        asked = self._parse(item, route)
        if asked is None:
            return
        rows = row_count(asked)
        if rows is None:
            self._alone.append(Batch(route, [item], [1], asked.inputs, asked.outputs))
        else:
            item.rows = rows
            self._parsed.setdefault((route.deployment_id, item.is_rows, asked.groups, key_of(asked)), (route, []))[1].append(item)

    def _is_batchable(self, route: Route) -> bool:
        known = self._batchable.get(route.deployment_id)
        if known is None:
            known = self._batchable[route.deployment_id] = is_batchable(route.signature)
        return known

    def _parse(self, item: Item, route: Route) -> InferRequest | None:
        try:
            return guarded("read", item.parse, route.signature)
        except MillraceError as error:
            self.failed.append((item, error))
            return None


def guarded(doing: str, call: Callable[..., T], *arguments: Any) -> T:
    """What ``call`` returns; raises ``InternalError`` for what it raises, unless that is an error of ours."""
    try:
        return call(*arguments)
    except MillraceError:
        raise
    except Exception as error:
        log.exception("a bug: a record could not be %s", doing)
        raise InternalError(f"something went wrong in Millrace while this record was {doing}") from error


def _plain_rows(document: dict[str, Any]) -> int:
    """The rows of a body that has nothing but rows, or one V2 tensor with as many values as its shape says; else 0."""
    instances = document.get("instances")
    if type(instances) is list and len(document) == 1:
        return len(instances)
    match document.get("inputs"):
        case [{"name": str(), "datatype": str(), "shape": [int(rows), *rest], "data": [first, *_] as data} as tensor] if (
            len(tensor) == 4
            and type(first) is not list
            and all(type(size) is int and size > 0 for size in (rows, *rest))
            and len(data) == rows * math.prod(rest)
        ):
            return rows
    return 0


def _named_outputs(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The outputs that a V2 body asks for by their names alone; empty when it asks for none, or for more than that."""
    outputs = document.get("outputs")
    if type(outputs) is not list or not all(type(output) is dict and len(output) == 1 for output in outputs):
        return ()
    names = tuple(output.get("name") for output in outputs)
    return names if all(type(name) is str for name in names) else ()


def _kind(item: Item) -> tuple[Any, ...]:
    """What plain requests must have in common to be read as one."""
    if item.is_rows:
        return ()
    assert item.document is not None  # noqa: S101 (plain requests are JSON; for the type checker)
    tensor = item.document["inputs"][0]
    return (_named_outputs(item.document), tensor["name"], tensor["datatype"], *tensor["shape"][1:])


def _as_one(items: Sequence[Item], counts: Sequence[int], signature: Signature) -> InferRequest:
    """Plain requests of one kind read as one; raises ``InvalidInputError``."""
    documents = [item.document for item in items if item.document is not None]
    if items[0].is_rows:
        return v1.from_document({"instances": list(chain.from_iterable(document["instances"] for document in documents))}, signature)
    first = documents[0]["inputs"][0]
    data = list(chain.from_iterable(document["inputs"][0]["data"] for document in documents))
    tensor = {**first, "shape": [sum(counts), *first["shape"][1:]], "data": data}
    return v2.from_document({**documents[0], "inputs": [tensor]}, signature)


def _cut(items: Sequence[Item], counts: Sequence[int], limit: int) -> Iterator[tuple[list[Item], list[int]]]:
    some: list[Item] = []
    some_counts: list[int] = []
    rows = 0
    for item, count in zip(items, counts, strict=True):
        if some and rows + count > limit:
            yield some, some_counts
            some, some_counts, rows = [], [], 0
        some.append(item)
        some_counts.append(count)
        rows += count
    if some:
        yield some, some_counts


def _concatenated(route: Route, items: list[Item], counts: list[int]) -> Batch:
    requests = [item.asked for item in items if item.asked is not None]
    return Batch(route, items, counts, whole(join(requests)), requests[0].outputs)
