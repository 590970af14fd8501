"""Tables of what was measured, and which goals are reached. Pure: results in, text out."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.figures import Load
from benchmarks.points import POINTS, Point
from benchmarks.results import Memory, Results

Row = Sequence[str]

OURS, BY_HAND, CEILING = "millrace", "fastapi", "asgi"


@dataclass(frozen=True)
class Line:
    """One goal: what is to be reached, and what was; ``reached`` None when it was not measured."""

    what: str
    target: str
    figure: str
    reached: bool | None


@dataclass(frozen=True)
class Table:
    """A table with its title."""

    title: str
    header: Row
    rows: Sequence[Row]

    def markdown(self) -> str:
        """The table, without its title."""
        rows = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def goals(results: Results) -> list[Line]:
    """All lines of the table of goals."""
    lines = [
        *(_ratio(results, f"requests/s, {point}, to FastAPI + joblib", f"iris-{point}", BY_HAND, 6.0) for point in (32, 128)),
        *(_ratio(results, f"requests/s, {point}, to a bare ASGI echo", f"iris-{point}", CEILING, 0.35) for point in (32, 128)),
        _ratio(results, "requests/s, a row of 10 numbers and 10 texts, to FastAPI + pandas + joblib", "table-32", BY_HAND, 5.0),
        _p99(results),
        _p50(results),
        _rows(results),
        _grpc(results),
    ]
    lines += [_cost(each.point, each.on, each.off) for each in results.cost]
    lines.append(_memory(results.memory))
    lines += _overload(results)
    return lines


def tables(results: Results) -> list[Table]:
    """Every table, the goals first."""
    found = [
        Table(
            "Goals",
            ("what", "to reach", "reached", ""),
            [(line.what, line.target, line.figure, _verdict(line.reached)) for line in goals(results)],
        ),
        *(_peers(results, points, title) for title, points in _GROUPS.items()),
        _features(results),
        _shares(results),
        _growth(results),
        _overload_table(results),
        _memory_table(results),
    ]
    return [table for table in found if table.rows]


_GROUPS: Mapping[str, Sequence[str]] = {
    "One row a request": ("iris-1", "iris-32", "iris-128", "cancer-32", "boosted-32", "split-32"),
    "Tables, one row a request": ("table-32",),
    "1000×30 a request": ("rows-json", "rows-binary", "rows-grpc"),
    "gRPC, one row a request": ("iris-grpc",),
}

_POINT: Mapping[str, Point] = {point.name: point for point in POINTS}


def memory_growth_percent(samples: Sequence[tuple[float, int]]) -> float | None:
    """Growth from the end of the first minute (of the first fifth, when it was shorter than five) to the end.

    Both ends are medians over a tenth of the time, so that one sample decides nothing.
    """
    if len(samples) < 4:
        return None
    end_s = samples[-1][0]
    start_s = min(60.0, end_s / 5)
    window_s = end_s / 10
    first = [size for at_s, size in samples if start_s <= at_s <= start_s + window_s]
    last = [size for at_s, size in samples if at_s >= end_s - window_s]
    if not first or not last:
        return None
    return 100 * (statistics.median(last) / statistics.median(first) - 1)


def _ratio(results: Results, what: str, point: str, other: str, target: float) -> Line:
    ours, theirs = results.load(OURS, point), results.load(other, point)
    shown = f"≥ {target:g} ×" if target >= 1 else f"≥ {100 * target:.0f} %"
    if ours is None or theirs is None or not theirs.requests_per_s:
        return Line(what, shown, "–", None)
    ratio = ours.requests_per_s / theirs.requests_per_s
    return Line(what, shown, f"{ratio:.1f} ×" if target >= 1 else f"{100 * ratio:.0f} %", ratio >= target)


def _p99(results: Results) -> Line:
    ours = results.load(OURS, "iris-32")
    theirs = {name: load for name in results.peers if name not in (OURS, CEILING) and (load := results.load(name, "iris-32")) is not None}
    what, target = "p99, iris 1×4, 32 connections", "lower than every peer's"
    if ours is None or not theirs:
        return Line(what, target, "–", None)
    best = min(theirs, key=lambda name: theirs[name].p99_ms)
    figure = f"{ours.p99_ms:.1f} ms; the best peer {theirs[best].p99_ms:.1f} ms ({best})"
    return Line(what, target, figure, ours.p99_ms < theirs[best].p99_ms)


def _p50(results: Results) -> Line:
    ours, theirs = results.load(OURS, "iris-1"), results.load(BY_HAND, "iris-1")
    what, target = "p50, iris 1×4, one connection", "≤ FastAPI + joblib's"
    if ours is None or theirs is None:
        return Line(what, target, "–", None)
    return Line(what, target, f"{ours.p50_ms:.2f} ms; FastAPI + joblib {theirs.p50_ms:.2f} ms", ours.p50_ms <= theirs.p50_ms)


def _rows(results: Results) -> Line:
    ours = results.load(OURS, "rows-binary")
    theirs = {point: load for point in ("rows-json", "rows-grpc") if (load := results.load("mlserver", point)) is not None}
    what, target = "rows/s, 1000×30 binary REST, to MLServer's fastest protocol", "≥ 5 ×"
    if ours is None or not theirs:
        return Line(what, target, "–", None)
    fastest = max(theirs, key=lambda point: theirs[point].requests_per_s)
    ratio = ours.requests_per_s / theirs[fastest].requests_per_s
    return Line(what, target, f"{ratio:.1f} × ({_POINT[fastest].form})", ratio >= 5)


def _grpc(results: Results) -> Line:
    return _ratio(results, "requests/s, gRPC 1×4, 32 connections, to MLServer gRPC", "iris-grpc", "mlserver", 3.0)


def _cost(point: str, on: Sequence[float], off: Sequence[float]) -> Line:
    what, target = f"cost of prediction log + metrics + tracing, {point}", "≤ 15 % of throughput"
    if not on or not off:
        return Line(what, target, "–", None)
    cost = 100 * (1 - statistics.median(on) / statistics.median(off))
    return Line(what, target, f"{cost:.1f} %", cost <= 15)


def _memory(memory: Memory | None) -> Line:
    what = "gateway memory under load, growth after the first minute"
    growth = memory_growth_percent(memory.samples) if memory else None
    if memory is None or growth is None:
        return Line(what, "< 5 % in 10 minutes", "–", None)
    return Line(what, "< 5 % in 10 minutes", f"{growth:+.1f} % in {memory.samples[-1][0] / 60:.1f} minutes", growth < 5)


def _overload(results: Results) -> list[Line]:
    lines = []
    for deadline_ms in sorted({each.deadline_ms for each in results.overload}):
        rows = {each.times_capacity: each for each in results.overload if each.deadline_ms == deadline_ms}
        if 1.0 in rows and 3.0 in rows:
            share = 100 * rows[3.0].answered_per_s / rows[1.0].answered_per_s if rows[1.0].answered_per_s else 0.0
            what = f"goodput at 3 × capacity to goodput at capacity, {_deadline(deadline_ms)}"
            lines.append(Line(what, "≥ 90 %", f"{share:.0f} %", share >= 90))
    return lines


def _peers(results: Results, points: Sequence[str], title: str) -> Table:
    rows = []
    for name, result in results.peers.items():
        cells = [_load_cell(results.load(name, point), _POINT[point]) for point in points]
        if any(cell != "–" for cell in cells):
            rows.append([result.title, *cells])
        elif result.problem:
            rows.append([result.title, result.problem, *[""] * (len(points) - 1)])
    return Table(f"{title}: {_unit(points)}", ("server", *(_POINT[point].title for point in points)), rows)


def _unit(points: Sequence[str]) -> str:
    return "rows/s · p50 · p99" if any(_POINT[point].rows > 1 for point in points) else "requests/s · p50 · p99"


def _load_cell(load: Load | None, point: Point) -> str:
    if load is None:
        return "–"
    per_s = load.requests_per_s * point.rows
    errors = f" · {load.errors} errors" if load.errors else ""
    return f"{_thousands(per_s)} · {_ms(load.p50_ms)} · {_ms(load.p99_ms)}{errors}"


def _features(results: Results) -> Table:
    rows = [(each.point, _median(each.on), _median(each.off), _cost(each.point, each.on, each.off).figure) for each in results.cost]
    return Table("Prediction log and tracing on and off: requests/s", ("load", "on", "off", "cost"), rows)


def _shares(results: Results) -> Table:
    points = list(dict.fromkeys(each.point for each in results.shares))
    parts = list(dict.fromkeys(each.part for each in results.shares))
    found = {(each.point, each.part): f"{each.percent:.0f} %" for each in results.shares}
    rows = [(point, *(found.get((point, part), "–") for part in parts)) for point in points]
    return Table("Millrace, where the cores go: percent of one core", ("load", *parts), rows)


def _growth(results: Results) -> Table:
    rows = []
    for each in results.growth:
        figures = statistics.median(load.requests_per_s for load in each.loads), statistics.median(load.p99_ms for load in each.loads)
        rows.append((each.point, str(each.workers), str(each.replicas), _thousands(figures[0]), _ms(figures[1])))
    return Table("Gateway workers and replicas", ("load", "workers", "replicas", "requests/s", "p99"), rows)


def _overload_table(results: Results) -> Table:
    header = ("offered", "deadline", "requests/s offered", "answered/s", "refused (429, 503)", "other errors", "p50 · p99 of the answered")
    rows = [
        (
            f"{each.times_capacity:g} × capacity",
            _deadline(each.deadline_ms),
            f"{each.offered_per_s:.0f}",
            f"{each.answered_per_s:.0f}",
            f"{each.refused_percent:.1f} %",
            f"{each.other_percent:.1f} %",
            f"{_ms(each.p50_ms)} · {_ms(each.p99_ms)}",
        )
        for each in results.overload
    ]
    return Table("Overload of a model that takes about 5 ms a row", header, rows)


def _memory_table(results: Results) -> Table:
    if results.memory is None or not results.memory.samples:
        return Table("Gateway memory", (), ())
    samples = results.memory.samples
    step = max(1, len(samples) // 10)
    rows = [(f"{at_s / 60:.1f} min", f"{size / 2**20:.1f} MiB") for at_s, size in [*samples[:-1:step], samples[-1]]]
    return Table("Gateway memory (resident) under load", ("after", "memory"), rows)


def _deadline(milliseconds: int) -> str:
    return f"deadline {milliseconds} ms" if milliseconds else "default deadline"


def _verdict(reached: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "not measured"}[reached]


def _median(values: Sequence[float]) -> str:
    return _thousands(statistics.median(values)) if values else "–"


def _thousands(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def documented(page: str, results: Results) -> str:
    """The page with what stands between its ``<!-- figures -->`` marks written anew.

    Raises
    ------
    ValueError
        The page has no such marks.
    """
    begin, end = "<!-- figures -->", "<!-- /figures -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the page has no {begin} … {end}")
    parts = [f"{results.machine}", *(f"{name}: {value}." for name, value in results.conditions.items())]
    blocks = [" ".join(part for part in parts if part)]
    blocks += [f"### {table.title}\n\n{table.markdown()}" for table in tables(results)]
    return before + begin + "\n\n" + "\n\n".join(blocks) + "\n\n" + end + after


Show = Callable[[str, Sequence[str], Sequence[Sequence[object]]], None]


def printed(results: Results, show: Show) -> None:
    """Print every table."""
    for table in tables(results):
        show(table.title, table.header, table.rows)
