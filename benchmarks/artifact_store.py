"""How much memory and time a large artifact takes in each store.

    python -m benchmarks.artifact_store [--size-mb 2048] [--store directory|s3]

Each store runs in a process of its own; memory is the peak of its resident set above what it had before the first byte. The S3 server is
a real one (``python -m tests.integration.servers build``). The goal: a 2 GB artifact never holds more than 64 MB.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from libs.artifacts import ArtifactStore, DirectoryStore
from libs.artifacts.s3 import Bucket, S3Store, s3_client
from tests.integration.servers import S3, run_s3

CHUNK_BYTES = 64 * 1024
"""What an HTTP upload arrives in."""

MEMORY_GOAL_MB = 64


async def _content(size_bytes: int) -> AsyncIterator[bytes]:
    seed = os.urandom(CHUNK_BYTES)
    for number in range(size_bytes // CHUNK_BYTES):
        yield number.to_bytes(8, "little") + seed[8:]


@contextmanager
def _store(name: str, directory: Path) -> Iterator[ArtifactStore]:
    if name == "directory":
        yield DirectoryStore(directory)
        return
    with run_s3(directory) as server:
        client = s3_client(server.endpoint, server.region, server.access_key, server.secret_key)
        client.make_bucket("benchmark")
        yield S3Store(client, Bucket("benchmark"))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def _measure(store: ArtifactStore, size_bytes: int, target: Path) -> dict[str, float]:
    before_mb = _peak_mb()
    started = time.monotonic()
    stored = await store.put(_content(size_bytes), max_bytes=size_bytes)
    put_s, started = time.monotonic() - started, time.monotonic()
    async for _ in store.open(stored.sha256):
        pass
    open_s, started = time.monotonic() - started, time.monotonic()
    await store.fetch_to(stored.sha256, target)
    fetch_s = time.monotonic() - started
    return {"put_s": put_s, "open_s": open_s, "fetch_s": fetch_s, "memory_mb": _peak_mb() - before_mb}


def _run_one(name: str, size_bytes: int) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, _store(name, Path(directory)) as store:
        print(json.dumps(asyncio.run(_measure(store, size_bytes, Path(directory, "fetched")))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=2048)
    parser.add_argument("--store", choices=["directory", "s3"], help="only this one")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        _run_one(options.store, options.size_mb * 2**20)
        return
    stores = [options.store] if options.store else ["directory", *(["s3"] if S3.path.exists() else [])]
    print(f"{'store':<10} {'size':>8} {'put':>10} {'open':>10} {'fetch_to':>10} {'memory':>9}   goal ≤ {MEMORY_GOAL_MB} MB")
    for name in stores:
        command = [sys.executable, "-m", "benchmarks.artifact_store", "--one", "--store", name, "--size-mb", str(options.size_mb)]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        speeds = " ".join(f"{options.size_mb / found[key]:>5.0f} MB/s" for key in ("put_s", "open_s", "fetch_s"))
        verdict = "met" if found["memory_mb"] <= MEMORY_GOAL_MB else "MISSED"
        print(f"{name:<10} {options.size_mb:>5} MB {speeds} {found['memory_mb']:>6.1f} MB   {verdict}", flush=True)


if __name__ == "__main__":
    main()
