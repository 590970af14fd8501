"""Holds runners back: a model that is restarted stays away for as long as a test needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held_back(artifact: Path) -> Iterator[None]:
    """Whoever reads the artifact waits until the end of the block; then it is empty once, and as it was the next time."""
    aside = artifact.with_suffix(".aside")
    artifact.rename(aside)
    os.mkfifo(artifact)
    both_ends = os.open(artifact, os.O_RDWR)
    try:
        yield
    finally:
        aside.replace(artifact)
        os.close(both_ends)
