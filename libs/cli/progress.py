"""What ``millrace up`` and ``millrace demo`` show while the platform starts."""

import sys
import time
from typing import TYPE_CHECKING

from libs.cli import output

if TYPE_CHECKING:
    from libs.local.platform import Notice, PlatformStatus
    from libs.local.supervisor import Event


class Progress:
    """Says each part as it becomes ready, and what goes wrong on the way."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._is_ready = False

    def __call__(self, said: "Event | Notice") -> None:
        from libs.local.platform import Notice
        from libs.local.supervisor import State

        if isinstance(said, Notice):
            banner(said.text) if said.is_loud else output.note(f"  {said.text}")
        elif said.state is State.READY:
            output.say(f"  {said.part:<12} ready {output.duration(said.elapsed_s):>9}")
        elif said.state is State.EXITED:
            output.note(f"  {said.part:<12} {said.detail}")
        sys.stdout.flush()

    def all_ready(self, status: "PlatformStatus", ending: str) -> None:
        """Say that everything is ready, and where; or that endpoints are not."""
        word = "ready" if status.is_ready else "up, but not ready,"
        output.say(f"{word} in {output.duration(time.monotonic() - self._began)}: {status.gateway}  (API page at /docs; {ending})")
        sys.stdout.flush()


def banner(text: str) -> None:
    """Something that must not be overlooked."""
    rule = "!" * 78
    output.note(f"\n{rule}\n{text}\n{rule}\n")
