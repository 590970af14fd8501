"""``python -m services.builder``"""

import asyncio

from libs import lifecycle, telemetry
from services.builder.app import build
from services.builder.settings import Settings


def main() -> None:
    """Run the builder until it is told to stop."""
    settings = Settings()
    provider = telemetry.configure("builder", settings.telemetry)
    try:
        asyncio.run(_run(settings))
    finally:
        provider.shutdown()


async def _run(settings: Settings) -> None:
    await lifecycle.run(build(settings), settings.process.ready_file)


if __name__ == "__main__":
    main()
