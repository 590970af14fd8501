"""The gateway beside its peers: requests a second and latency under the same load, and what else is promised of the data plane.

    python -m benchmarks serving                              everything, about 25 minutes
    python -m benchmarks serving --sections peers --only millrace,fastapi,asgi
    python -m benchmarks serving --quick                      each point for a second, once
    python -m benchmarks serving --show                       print what is kept, measure nothing
    python -m benchmarks serving --write-docs                 and write it into docs/performance.md

Servers are installed into environments of their own and run one at a time on loopback, all cores theirs and the load generator's; the
order rotates from round to round, and figures are medians over the rounds. Every server's answers are compared with the model's
before it is loaded. One that cannot be installed or started is reported as such. Results are kept in
``benchmarks/results/serving.json`` after each server; what is not measured again stays.
"""

import argparse
import os
import platform as machine
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

from benchmarks import overload, report
from benchmarks.brokers import free_port
from benchmarks.collector import collector
from benchmarks.figures import Load, rotated
from benchmarks.peers import ghz, models, wrk
from benchmarks.peers.asgi_echo import AsgiEcho
from benchmarks.peers.bentoml import BentoML
from benchmarks.peers.fastapi_joblib import FastApiJoblib
from benchmarks.peers.kserve import KServe
from benchmarks.peers.litserve import LitServe
from benchmarks.peers.millrace import Features, Millrace
from benchmarks.peers.mlserver import MLServer
from benchmarks.peers.models import TrainedModel
from benchmarks.peers.peer import Form, Peer, PeerError, Place, Request
from benchmarks.peers.ray_serve import RayServe
from benchmarks.platform import processes
from benchmarks.points import POINTS, Point
from benchmarks.results import Cost, Growth, Memory, PeerResult, Results, Share, read, write
from benchmarks.tables import show

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "serving.json"
PAGE = ROOT / "docs" / "performance.md"
PEERS = (FastApiJoblib, AsgiEcho, KServe, MLServer, LitServe, BentoML, RayServe)
SECTIONS = ("peers", "cost", "memory", "overload", "growth")

_WARM_UP_S = 1.0
_ANSWERS_S = 60.0
"""How long a server that says it is ready may still answer wrongly or not at all."""

_OVERLOAD_S = 10.0
_SAMPLE_S = 2.0
_POINT: Mapping[str, Point] = {point.name: point for point in POINTS}

_Failure = (RuntimeError, OSError, ValueError, LookupError, subprocess.SubprocessError, httpx.HTTPError, psutil.Error)
"""Whatever goes wrong with one server is told in the table and ends nothing else."""


@dataclass(frozen=True)
class Options:
    """How long, how often and what; ``seconds`` of load for each point and round, ``minutes`` of load while memory is watched."""

    seconds: float
    rounds: int
    minutes: float
    sections: Sequence[str]
    only: Sequence[str]
    points: Sequence[str]
    kept: Path


@dataclass
class Bench:
    """What all sections share."""

    options: Options
    folder: Path
    collector: str
    generator: wrk.Wrk
    trained: Mapping[str, TrainedModel]
    results: Results
    ghz: Path | None = None
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, name: str) -> Place:
        """Where a server of that name runs: the same folder each time, ports of their own."""
        if name not in self.places:
            scratch = self.folder / name
            scratch.mkdir()
            self.places[name] = Place(self.folder / "models", scratch, free_port(), free_port())
        return self.places[name]

    def load(self, request: Request, form: Form, connections: int, seconds: float) -> Load:
        """Load a server."""
        if form is not Form.GRPC:
            return self.generator.run(request, connections, seconds, self.folder)
        if self.ghz is None:
            self.ghz = ghz.built()
        return ghz.run(self.ghz, request.url, request.body, connections, seconds, self.folder, **request.headers)

    def point(self, peer: Peer, place: Place, point: Point, *, seconds: float | None = None) -> Load:
        """Check a server's answer, warm it up and load it; raises ``PeerError``."""
        model = self.trained["cancer" if point.model == "split" else point.model]
        request = peer.request(place, point.model, model.rows[: point.rows], point.form)
        if point.form is not Form.GRPC and peer.models:
            check(peer, request, point, model.labels[: point.rows])
        warm = self.load(request, point.form, point.connections, _WARM_UP_S)
        if warm.errors >= warm.requests:
            raise PeerError(f"{peer.title} answers nothing but errors to {point.title}")
        return self.load(request, point.form, point.connections, seconds or self.options.seconds)

    def keep(self, section: str) -> None:
        """Write what there is."""
        self.results.measured_at[section] = _now()
        write(self.options.kept, self.results)


def check(peer: Peer, request: Request, point: Point, labels: Sequence[int]) -> None:
    """Ask once and compare; a server that has just started is given some time.

    Raises
    ------
    PeerError
        It does not answer, or with other labels than the model's.
    """
    end = time.monotonic() + _ANSWERS_S
    while True:
        try:
            answer = httpx.post(request.url, content=request.body, headers=dict(request.headers), timeout=30)
            if answer.status_code == 200:
                found = peer.labels(answer.content, {name.lower(): value for name, value in answer.headers.items()}, point.form)
                if found != list(labels):
                    raise PeerError(f"{peer.title} answers {point.title} with other labels than the model's")
                return
            said = f"{answer.status_code} {answer.text[:200]}"
        except httpx.HTTPError as error:
            said = str(error)
        if time.monotonic() > end:
            raise PeerError(f"{peer.title} does not answer {point.title}: {said}")
        time.sleep(0.2)


def measure_peers(bench: Bench) -> None:
    """All servers at all points, round by round."""
    every: dict[str, Peer] = {Millrace.name: Millrace(bench.collector), **{kind.name: kind() for kind in PEERS}}
    names = [name for name in every if not bench.options.only or name in bench.options.only]
    fresh = {name: PeerResult(every[name].title, _now()) for name in names}
    for number in range(bench.options.rounds):
        for name in rotated(names, number):
            _say(f"round {number + 1} of {bench.options.rounds}: {every[name].title}")
            measure_peer(bench, every[name], fresh[name], is_last=number + 1 == bench.options.rounds)
            bench.results.peers = {
                **{key: value for key, value in bench.results.peers.items() if key in every},
                **{key: value for key, value in fresh.items() if value.loads or value.problem},
            }
            bench.results.peers = {key: bench.results.peers[key] for key in every if key in bench.results.peers}
            bench.keep("peers")


def measure_peer(bench: Bench, peer: Peer, result: PeerResult, *, is_last: bool) -> None:
    """One round of one server; whatever goes wrong becomes its ``problem``."""
    place = bench.place(peer.name)
    try:
        peer.install()
        with peer.running(place):
            for point in POINTS:
                if not point.is_for(peer) or (bench.options.points and point.name not in bench.options.points):
                    continue
                try:
                    with shares(bench, peer, place, point) if is_last else _nothing():
                        load = bench.point(peer, place, point)
                except _Failure as error:
                    result.problem = f"{point.title}: {_short(error)}"
                    _say(f"  {result.problem}")
                    continue
                _say(f"  {point.title}: {_told(load)}")
                result.loads.setdefault(point.name, []).append(load)
    except _Failure as error:
        result.problem = _short(error)
        _say(f"  {result.problem}")


@contextmanager
def shares(bench: Bench, peer: Peer, place: Place, point: Point) -> Iterator[None]:
    """Keep how much of a core each part of ours takes meanwhile."""
    if not isinstance(peer, Millrace):
        yield
        return
    gateway = {each.pid for each in peer.gateway()}
    members = {process: _part(process, gateway) for process in processes(place.scratch / "home")}
    before = {process: _cpu_s(process) for process in members}
    generator_s, began = _children_s(), time.perf_counter()
    yield
    took_s = time.perf_counter() - began
    used: dict[str, float] = {"load generator": _children_s() - generator_s}
    for process, part in members.items():
        used[part] = used.get(part, 0.0) + max(0.0, _cpu_s(process) - before[process])
    bench.results.shares = [each for each in bench.results.shares if each.point != point.title]
    ordered = sorted(used.items(), key=lambda item: -item[1])
    bench.results.shares += [Share(point.title, part, 100 * cpu_s / took_s) for part, cpu_s in ordered if cpu_s / took_s >= 0.01]


def measure_cost(bench: Bench) -> None:
    """The same gateway with the prediction log and tracing on and off, in turn."""
    points = ("iris-32",)
    found = {name: Cost(name, [], []) for name in points}
    place = bench.place("cost")
    for number in range(bench.options.rounds):
        for is_on in rotated(("on", "off"), number):
            features = Features() if is_on == "on" else Features(prediction_log=False, sampled=0.0)
            peer = Millrace(bench.collector, features, ("iris",))
            with peer.running(place):
                for name in points:
                    load = bench.point(peer, place, _POINT[name])
                    getattr(found[name], is_on).append(load.requests_per_s)
                    _say(f"log and tracing {is_on}, {name}: {load.requests_per_s:,.0f}/s")
    bench.results.cost = list(found.values())


def measure_memory(bench: Bench) -> None:
    """The gateway's resident memory while it is loaded without a break."""
    point, place = _POINT["iris-32"], bench.place("memory")
    peer = Millrace(bench.collector, deployed=("iris",))
    samples: list[tuple[float, int]] = []
    with peer.running(place), ThreadPoolExecutor(1) as pool:
        bench.point(peer, place, point, seconds=1.0)
        gateway = peer.gateway()
        request = peer.request(place, point.model, bench.trained["iris"].rows[:1], point.form)
        began = time.monotonic()
        load = pool.submit(bench.load, request, point.form, point.connections, 60 * bench.options.minutes)
        while not load.done():
            samples.append((time.monotonic() - began, sum(process.memory_info().rss for process in gateway)))
            time.sleep(_SAMPLE_S)
        load.result()
    bench.results.memory = Memory(samples)


def measure_overload(bench: Bench) -> None:
    """Goodput of a slow model at what it can do, and at three times that."""
    folder = bench.folder / "slow"
    folder.mkdir()
    slow, row_ms = models.slow(folder)
    place = Place(folder, folder, free_port(), free_port())
    peer = Millrace(bench.collector, deployed=("slow",))
    with peer.running(place):
        request = peer.request(place, "slow", slow.rows[:1], Form.JSON)
        check(peer, request, Point("slow", "a slow model", "slow", 1, Form.JSON, 1), slow.labels[:1])
        bench.load(request, Form.JSON, 4, _WARM_UP_S)
        capacity = bench.load(request, Form.JSON, 4, bench.options.seconds).requests_per_s
        _say(f"a row takes {row_ms:.1f} ms; capacity {capacity:.0f}/s")
        bench.results.overload = []
        for deadline_ms in (0, 1_000):
            for times in (1.0, 3.0):
                found = overload.measured(request, capacity, times, deadline_ms, max(_OVERLOAD_S, 2 * bench.options.seconds), bench.folder)
                _say(f"{times:g} × capacity, deadline {deadline_ms} ms: {found}")
                bench.results.overload.append(found)


def measure_growth(bench: Bench) -> None:
    """Requests a second by gateway workers, and by replicas of a model that costs milliseconds."""
    found: list[Growth] = []
    place = bench.place("growth")
    rounds = max(1, bench.options.rounds - 1)
    for workers in (1, 2, 4):
        peer = Millrace(bench.collector, Features(workers=workers), ("iris", "boosted"))
        with peer.running(place):
            loads = [bench.point(peer, place, _POINT["iris-128"]) for _ in range(rounds)]
            found.append(Growth(_POINT["iris-128"].title, workers, 1, loads))
            for replicas in (1, 2, 4) if workers == 1 else ():
                peer.scale("boosted", replicas)
                loads = [bench.point(peer, place, _POINT["boosted-32"]) for _ in range(rounds)]
                found.append(Growth(_POINT["boosted-32"].title, workers, replicas, loads))
            if workers == 1:
                peer.scale("boosted", 1)
        _say(f"{workers} workers measured")
    bench.results.growth = found


MEASURE: Mapping[str, Callable[[Bench], None]] = {
    "peers": measure_peers,
    "cost": measure_cost,
    "memory": measure_memory,
    "overload": measure_overload,
    "growth": measure_growth,
}


def measure(options: Options) -> Results:
    """Measure what is asked for; what cannot be measured is said and left out."""
    results = read(options.kept)
    with tempfile.TemporaryDirectory(prefix="mr-bench-", dir="/var/tmp") as directory, collector() as (endpoint, what):
        folder = Path(directory)
        (folder / "models").mkdir()
        generator = wrk.load_generator()
        bench = Bench(options, folder, endpoint, generator, models.train(folder / "models"), results)
        results.machine = _machine()
        results.conditions = {
            "Load": f"{generator.title}, ghz {ghz.VERSION} for gRPC, on the same machine",
            "Each point": f"{options.seconds:g} s after {_WARM_UP_S:g} s of warm-up, medians of {options.rounds} rounds",
            "Traces": f"1 % to {what}",
            "Other work": f"load average {os.getloadavg()[0]:.1f} before the run",
        }
        for section in options.sections:
            try:
                MEASURE[section](bench)
                bench.keep(section)
            except _Failure as error:
                _say(f"{section} could not be measured: {_short(error)}")
    return results


def _told(load: Load) -> str:
    return f"{load.requests_per_s:,.0f}/s, p50 {load.p50_ms:.2f} ms, p99 {load.p99_ms:.2f} ms, {load.errors} errors"


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _part(process: psutil.Process, gateway: Collection[int]) -> str:
    command = " ".join(process.cmdline())
    if process.pid in gateway:
        return "gateway"
    for mark, part in (("libs.runner", "runners"), ("libs/runner", "runners"), ("java", "Kafka"), ("kafka", "Kafka"), ("ray", "Ray")):
        if mark in command:
            return part
    return "the other services"


def _cpu_s(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:2]))
    except psutil.Error:
        return 0.0


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _machine() -> str:
    memory_gib = psutil.virtual_memory().total / 2**30
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), machine.machine()
    )
    return (
        f"{os.cpu_count()} cores ({cpu}), {memory_gib:.0f} GiB, {machine.system()} {machine.release()}, Python {machine.python_version()}."
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of load for each point and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="of load while memory is watched")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which to measure, with commas between")
    parser.add_argument("--only", default="", help="servers to measure again, with commas between")
    parser.add_argument("--points", default="", help="points to measure, with commas between")
    parser.add_argument("--kept", type=Path, help=f"file of the results; else {KEPT.relative_to(ROOT)}, and a temporary one for --quick")
    parser.add_argument("--quick", action="store_true", help="one second, one round, half a minute")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--write-docs", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    seconds, rounds, minutes = (1.0, 1, 0.5) if given.quick else (given.seconds, given.rounds, given.minutes)
    kept = given.kept or (Path(tempfile.gettempdir(), "millrace-serving-quick.json") if given.quick else KEPT)
    options = Options(seconds, rounds, minutes, _words(given.sections), _words(given.only), _words(given.points), kept)
    unknown = [word for word in options.sections if word not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    results = read(kept) if given.show else measure(options)
    report.printed(results, show)
    if given.write_docs:
        PAGE.write_text(report.documented(PAGE.read_text(), results))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


if __name__ == "__main__":
    main()
