"""Where the gateway's time goes under load, and what changed since another profile.

    python -m benchmarks.profile_gateway [--point iris-32] [--seconds 10] [--stacks after.txt] [--against before.txt]

A platform with everything on is loaded and sampled by py-spy, which must be installed (``.venv/bin/uv pip install py-spy``; it needs
the right to trace processes). Prints the functions with the most time of their own, in percent of the samples in which the gateway
ran; ``--stacks`` keeps the samples (collapsed stacks, which flame-graph tools read), ``--against`` shows the difference to such a file.
"""

import argparse
import collections
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.brokers import free_port
from benchmarks.collector import collector
from benchmarks.peers import models, wrk
from benchmarks.peers.millrace import Millrace
from benchmarks.peers.peer import Form, Place
from benchmarks.points import POINTS, Point
from benchmarks.tables import show

_SAMPLES_PER_S = 400
_SHOWN = 30


def own_percent(stacks: str) -> dict[str, float]:
    """Percent of the samples that each function was at the top of a stack; ``stacks`` are lines of ``frame;frame;frame count``."""
    counts: collections.Counter[str] = collections.Counter()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        counts[_function(frames.rpartition(";")[2])] += int(count)
    total = sum(counts.values())
    return {function: 100 * count / total for function, count in counts.most_common()}


def table(now: Mapping[str, float], before: Mapping[str, float] | None) -> list[tuple[str, ...]]:
    """Rows of the functions with the most time of their own, or with the largest difference."""
    if before is None:
        return [(f"{percent:.1f}", function) for function, percent in list(now.items())[:_SHOWN]]
    change = {function: now.get(function, 0.0) - before.get(function, 0.0) for function in {*now, *before}}
    ordered = sorted(change, key=lambda function: -abs(change[function]))[:_SHOWN]
    return [(f"{now.get(function, 0.0):.1f}", f"{change[function]:+.1f}", function) for function in ordered]


def profile(point: Point, seconds: int) -> str:
    """Collapsed stacks of the gateway under a load."""
    with tempfile.TemporaryDirectory(prefix="mr-profile-", dir="/var/tmp") as directory, collector() as (endpoint, _):
        folder = Path(directory)
        trained = models.train(folder)
        place = Place(folder, folder, free_port(), free_port())
        peer = Millrace(endpoint, deployed=(point.model,))
        with peer.running(place), ThreadPoolExecutor(1) as pool:
            rows = trained["cancer" if point.model == "split" else point.model].rows[: point.rows]
            request = peer.request(place, point.model, rows, point.form)
            load = pool.submit(wrk.load_generator().run, request, point.connections, seconds + 4, folder)
            stacks = _record(peer.gateway()[0].pid, seconds, folder / "stacks")
            print(load.result())
        return stacks


def _record(pid: int, seconds: int, path: Path) -> str:
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        raise SystemExit("py-spy is not installed here: .venv/bin/uv pip install py-spy")
    options = ["--pid", str(pid), "--duration", str(seconds), "--rate", str(_SAMPLES_PER_S), "--format", "raw", "--output", str(path)]
    subprocess.run([program, "record", "--nonblocking", *options], check=True, stdout=subprocess.DEVNULL)
    return path.read_text()


def _function(frame: str) -> str:
    return frame.rpartition(":")[0] + ")" if frame.endswith(")") and ":" in frame else frame


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse options, profile, print."""
    points = {point.name: point for point in POINTS if point.form is not Form.GRPC}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", choices=list(points), default="iris-32")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--stacks", type=Path, help="file to keep the samples in")
    parser.add_argument("--against", type=Path, help="file of an earlier profile")
    options = parser.parse_args(arguments)
    stacks = profile(points[options.point], options.seconds)
    if options.stacks:
        options.stacks.write_text(stacks)
    before = own_percent(options.against.read_text()) if options.against else None
    header = ("own %", "function") if before is None else ("own %", "change", "function")
    show(f"The gateway under {points[options.point].title}", header, table(own_percent(stacks), before))


if __name__ == "__main__":
    main()
