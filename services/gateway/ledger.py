"""The request ledger: a file in memory that says which requests a gateway process has accepted and how they ended, whatever becomes of it.

Each process has its own. The pages of a mapped file belong to the kernel, so they outlive a process that is killed; the next gateway of
the same home finds the file, settles what was left, and removes it. Not covered is the machine itself going down: nothing is synced to
disk while requests are answered.

::

    header 4 KiB   magic, instance, times, counters        doors  what (endpoint, protocol) a number stands for
    slots          one per request that is in flight or whose row the log does not have yet, at sequence modulo their number
    spare slots    for a request whose own slot is still held by one that has been in flight for very long
"""

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from libs.errors import ConfigurationError
from schemas.predictions import OutcomeCounts, RequestCounters

COMPLETED, FAILED, EXPIRED = 2, 3, 4
"""State of a slot whose request has ended; 1 is in flight, 0 is free."""

_IN_FLIGHT = 1
_MAGIC = b"MILLRACE LEDGER 1"
_HEADER_BYTES = 4_096
_COUNTERS = 512
"""Where the counters begin: unsigned 64-bit, at the places below."""

_ACCEPTED, _RECORDS = 0, 1
_ENDED, _LOGGED, _LOST, _OFF = 2, 5, 8, 11
"""The first of three each: completed, failed, expired. ``logged`` are the rows whose writing the broker has acknowledged."""

_DOORS = 2_048
_DOOR = struct.Struct("<B63sB15s")
"""Endpoint and protocol, each with its length."""

_SLOT_BYTES = 160
_SLOTS = 65_536
"""Room for what is in flight and what waits for the broker; at 25 000 requests a second, 2.6 s."""

_SPARE = 1_024
_SLOT = struct.Struct("<QdIBB128s")
"""Sequence, time of acceptance on the process's clock, door, state, length of the request id, request id."""

_pack_slot = _SLOT.pack_into

_STATE = 20
_IDENTITY_BYTES = 128
_FIRST_DOOR = _HEADER_BYTES
_FIRST_SLOT = _FIRST_DOOR + _DOORS * _DOOR.size
_NOWHERE = _FIRST_SLOT + (_SLOTS + _SPARE) * _SLOT_BYTES
"""One slot more, for requests that find no place: they are counted, but their ids would not be known."""

_SIZE_BYTES = _NOWHERE + _SLOT_BYTES

_SLOT_TYPE = np.dtype(
    {
        "names": ["sequence", "accepted_s", "door", "state", "length", "identity"],
        "formats": ["<u8", "<f8", "<u4", "u1", "u1", f"V{_IDENTITY_BYTES}"],
        "offsets": [0, 8, 16, _STATE, 21, 22],
        "itemsize": _SLOT_BYTES,
    }
)

_IDENTITY = struct.Struct("<17s32sdd")
"""Magic, instance, wall clock and the process's clock when it began, both in seconds."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A request that a gateway left: ``state`` is how it ended, FAILED when it had not."""

    sequence: int
    request_id: str
    endpoint_name: str
    protocol: str
    accepted_at: float
    state: int
    was_in_flight: bool


@dataclass(frozen=True, slots=True)
class Remains:
    """What a ledger holds whose gateway is gone: everything that it has to say still.

    ``counters`` are final: what was in flight has failed. ``in_doubt`` of the lost rows may be in the log.
    """

    instance: str
    records: int
    counters: RequestCounters
    unfinished: list[Unfinished] = field(default_factory=list)
    in_doubt: int = 0


class Ledger:
    """The ledger of this process.

    ``begin`` and ``end`` are on the way of every request: a few writes into memory each.

    Parameters
    ----------
    directory
        Where ledgers are kept; made if it is not there.
    instance
        32 characters that name this process among all that ever were.
    now_s
        The clock of the times given to ``begin``, now.

    Raises
    ------
    ConfigurationError
        When the file cannot be made.
    """

    def __init__(self, directory: Path, instance: str, now_s: float) -> None:
        self.instance = instance
        self.path = directory / f"ledger-{instance}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = _locked_file(self.path)
            self._map = mmap.mmap(self._file, _SIZE_BYTES)
        except OSError as error:
            raise ConfigurationError(f"the request ledger {self.path} cannot be made: {error.strerror}") from error
        self._memory = memoryview(self._map)
        self._counters = self._memory[_COUNTERS:_HEADER_BYTES].cast("Q")
        self._slots: npt.NDArray[Any] = np.frombuffer(self._map, _SLOT_TYPE, _SLOTS, _FIRST_SLOT)
        self._spare = [_FIRST_SLOT + (_SLOTS + number) * _SLOT_BYTES for number in range(_SPARE)]
        self._displaced: dict[int, int] = {}
        self._doors = 0
        _IDENTITY.pack_into(self._memory, 0, _MAGIC, instance.encode(), time.time(), now_s)

    def door(self, endpoint_name: str, protocol: str) -> int:
        """A number for ``begin``; ask once per endpoint and protocol."""
        if self._doors + 1 >= _DOORS:
            return 0
        self._doors += 1
        endpoint, form = endpoint_name.encode()[:63], protocol.encode()[:15]
        _DOOR.pack_into(self._memory, _FIRST_DOOR + self._doors * _DOOR.size, len(endpoint), endpoint, len(form), form)
        return self._doors

    def begin(self, sequence: int, accepted_s: float, door: int, request_id: str) -> None:
        """A request was accepted; ``sequence`` is one more than the one before."""
        offset = _FIRST_SLOT + (sequence & (_SLOTS - 1)) * _SLOT_BYTES
        memory = self._memory
        if memory[offset + _STATE] == _IN_FLIGHT:
            offset = self._displace(sequence)
        identity = request_id.encode()[:_IDENTITY_BYTES]
        _pack_slot(memory, offset, sequence, accepted_s, door, _IN_FLIGHT, len(identity), identity)
        self._counters[_ACCEPTED] = sequence

    def end(self, sequence: int, state: int) -> None:
        """A request ended: ``state`` is COMPLETED, FAILED or EXPIRED."""
        offset = _FIRST_SLOT + (sequence & (_SLOTS - 1)) * _SLOT_BYTES
        if self._displaced:
            offset = self._displaced.get(sequence, offset)
        self._memory[offset + _STATE] = state
        self._counters[state] += 1

    def logged(self, sequences: npt.NDArray[np.int64], counts: OutcomeCounts) -> None:
        """The broker has the rows of these requests."""
        self._settle(_LOGGED, sequences, counts)

    def lost(self, sequences: npt.NDArray[np.int64], counts: OutcomeCounts) -> None:
        """The rows of these requests were given up."""
        self._settle(_LOST, sequences, counts)

    def off(self, sequences: npt.NDArray[np.int64], counts: OutcomeCounts) -> None:
        """These requests have no rows."""
        self._settle(_OFF, sequences, counts)

    @property
    def records(self) -> int:
        """Records of the log made so far."""
        return self._counters[_RECORDS]

    @records.setter
    def records(self, value: int) -> None:
        self._counters[_RECORDS] = value

    def counters(self) -> RequestCounters:
        """Everything counted up to now; ``logged`` are the rows that the broker has acknowledged."""
        return _counters(self._counters)

    @property
    def is_settled(self) -> bool:
        """Whether every request accepted has ended and its row is in the log, or accounted for otherwise."""
        counters = self.counters()
        return counters.in_flight == 0 and counters.waiting == 0

    def close(self, *, remove: bool) -> None:
        """Let go of the file; unless it is removed, the next gateway settles it."""
        if self._file < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        self._slots = np.empty(0, _SLOT_TYPE)
        self._counters.release()
        self._memory.release()
        self._map.close()
        os.close(self._file)
        self._file = -1

    def _displace(self, sequence: int) -> int:
        offset = self._spare.pop() if self._spare else _NOWHERE
        self._displaced[sequence] = offset
        return offset

    def _settle(self, first: int, sequences: npt.NDArray[np.int64], counts: OutcomeCounts) -> None:
        # Counters before slots: a process that ends in between leaves rows that come twice, not rows that nobody knows of.
        for place, count in enumerate((counts.completed, counts.failed, counts.expired)):
            self._counters[first + place] += count
        places = sequences & (_SLOTS - 1)
        own = self._slots["sequence"][places] == sequences
        self._slots["state"][places[own]] = 0
        if self._displaced:
            self._return_spares(sequences)

    def _return_spares(self, sequences: npt.NDArray[np.int64]) -> None:
        for sequence in self._displaced.keys() & set(sequences.tolist()):
            offset = self._displaced.pop(sequence)
            if offset != _NOWHERE:
                self._memory[offset + _STATE] = 0
                self._spare.append(offset)


def _locked_file(path: Path) -> int:
    """A new file of the right size that is held before anybody else can see it by its name."""
    partial = path.with_name(f".{path.name}")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # All of it at once: writing to a mapped page that the disk has no room for ends the process.
        os.posix_fallocate(descriptor, 0, _SIZE_BYTES)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


class Orphan:
    """A ledger whose gateway is gone, held by this process so that nobody else settles it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def read(self) -> Remains | None:
        """What it holds; None when it is no ledger, or one that was never begun."""
        content = os.pread(self._descriptor, _SIZE_BYTES, 0)
        if len(content) < _SIZE_BYTES or not content.startswith(_MAGIC):
            return None
        return _remains(content)

    def remove(self) -> None:
        """All has been said."""
        self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Leave it to somebody else, or for later."""
        os.close(self._descriptor)


def orphans(directory: Path) -> Iterator[Orphan]:
    """Ledgers of gateways that are gone; whoever takes one removes or releases it."""
    for path in sorted(directory.glob("ledger-*")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            continue
        if path.exists():
            yield Orphan(path, descriptor)
        else:
            os.close(descriptor)


def _remains(content: bytes) -> Remains:
    _, name, began_at, began_s = _IDENTITY.unpack_from(content)
    slots = np.frombuffer(content, _SLOT_TYPE, _SLOTS + _SPARE, _FIRST_SLOT)
    slots = slots[slots["state"] != 0]
    numbers = memoryview(content)[_COUNTERS:_HEADER_BYTES].cast("Q")
    counters = _counters(numbers)
    in_flight = slots[slots["state"] == _IN_FLIGHT]
    accepted = max(counters.accepted, int(slots["sequence"].max(initial=0)))
    ended = _repaired(counters, accepted - len(in_flight), slots)
    unfinished = [_unfinished(content, slot, began_at - began_s) for slot in slots]
    listed = _counts_of_states(slots["state"])
    known = counters.logged.total + counters.off.total + counters.lost.total + listed.total
    unlisted = max(0, ended.total - known)
    # Requests in flight that had found no slot: counted, never ended, and without an id.
    nameless = max(0, accepted - ended.total - len(in_flight))
    failed = ended.failed + len(in_flight) + nameless
    final = OutcomeCounts(completed=ended.completed, failed=failed, expired=ended.expired)
    lost = _plus_unlisted(counters, final, listed, len(in_flight))
    logged = OutcomeCounts(**{each: getattr(final, each) - getattr(lost, each) - getattr(counters.off, each) for each in _OUTCOMES})
    said = RequestCounters(accepted=accepted, ended=final, logged=logged, lost=lost, off=counters.off)
    return Remains(name.decode("ascii", "replace").strip("\0"), numbers[_RECORDS], said, unfinished, unlisted)


_OUTCOMES = ("completed", "failed", "expired")


def _repaired(counters: RequestCounters, ended: int, slots: npt.NDArray[Any]) -> OutcomeCounts:
    """The counts of what ended, with the one request that the process may have been ending when it was killed.

    Its slot says how it ended and its counter does not yet.
    """
    if ended != counters.ended.total + 1:
        return counters.ended
    listed = _counts_of_states(slots["state"])
    for each in _OUTCOMES:
        settled = getattr(counters.logged, each) + getattr(counters.lost, each) + getattr(counters.off, each)
        if getattr(counters.ended, each) < settled + getattr(listed, each):
            return counters.ended.model_copy(update={each: getattr(counters.ended, each) + 1})
    return counters.ended


def _plus_unlisted(counters: RequestCounters, final: OutcomeCounts, listed: OutcomeCounts, in_flight: int) -> OutcomeCounts:
    """The lost rows, with those whose slot was taken by a later request before the log had them."""
    lost = {}
    for each in _OUTCOMES:
        kept = getattr(counters.logged, each) + getattr(counters.off, each) + getattr(listed, each)
        kept += in_flight if each == "failed" else 0
        lost[each] = max(getattr(counters.lost, each), getattr(final, each) - kept)
    return OutcomeCounts(**lost)


def _counters(numbers: memoryview) -> RequestCounters:
    def three(first: int) -> OutcomeCounts:
        return OutcomeCounts(completed=numbers[first], failed=numbers[first + 1], expired=numbers[first + 2])

    return RequestCounters(accepted=numbers[_ACCEPTED], ended=three(_ENDED), logged=three(_LOGGED), lost=three(_LOST), off=three(_OFF))


def _counts_of_states(states: npt.NDArray[Any]) -> OutcomeCounts:
    numbers = np.bincount(states, minlength=EXPIRED + 1).tolist()
    return OutcomeCounts(completed=numbers[COMPLETED], failed=numbers[FAILED], expired=numbers[EXPIRED])


def _unfinished(content: bytes, slot: Any, wall_minus_clock_s: float) -> Unfinished:
    endpoint_length, endpoint, form_length, form = _DOOR.unpack_from(content, _FIRST_DOOR + int(slot["door"]) % _DOORS * _DOOR.size)
    was_in_flight = int(slot["state"]) == _IN_FLIGHT
    return Unfinished(
        sequence=int(slot["sequence"]),
        request_id=slot["identity"].tobytes()[: int(slot["length"])].decode("utf-8", "replace"),
        endpoint_name=endpoint[:endpoint_length].decode("utf-8", "replace"),
        protocol=form[:form_length].decode("utf-8", "replace"),
        accepted_at=float(slot["accepted_s"]) + wall_minus_clock_s,
        state=FAILED if was_in_flight else int(slot["state"]),
        was_in_flight=was_in_flight,
    )
