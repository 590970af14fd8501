"""``python -m services.gateway``"""

import gc
import sys

import uvloop

from libs.lifecycle import Component
from libs.metrics import PROCESS
from libs.process import run_service
from services.gateway.app import build
from services.gateway.settings import Settings
from services.gateway.workers import SupervisorWatch, Workers, worker_number, worker_settings

COLLECT_AFTER = 50_000
"""New objects after which cycles are looked for; 700 by default. Requests in hand are none, and there are thousands of them a second."""


def main() -> None:
    """Run the gateway in this process, or in as many workers as it is told to have."""
    number = worker_number(sys.argv[1:])

    def settings() -> Settings:
        return Settings() if number is None else worker_settings(Settings(), number)

    def components(settings: Settings) -> list[Component]:
        if number is None and settings.workers > 1:
            return [Workers(settings)]
        if number is None:
            return list(build(settings).components)
        PROCESS.worker = str(number)
        return [*build(settings, reuse_port=True).components, SupervisorWatch()]

    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 50)
    run_service("gateway", settings, components, uvloop.run)


if __name__ == "__main__":
    main()
