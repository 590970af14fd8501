"""``python -m services.validator``"""

import asyncio

from libs import lifecycle, telemetry
from services.validator.app import build
from services.validator.settings import Settings


def main() -> None:
    """Run the validator until it is told to stop."""
    settings = Settings()
    provider = telemetry.configure("validator", settings.telemetry)
    try:
        asyncio.run(_run(settings))
    finally:
        provider.shutdown()


async def _run(settings: Settings) -> None:
    await lifecycle.run(build(settings), settings.process.ready_file)


if __name__ == "__main__":
    main()
