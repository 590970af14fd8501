"""``python -m services.serving``"""

import asyncio

from libs import lifecycle, telemetry
from services.serving.app import build
from services.serving.settings import Settings


def main() -> None:
    """Run serving until it is told to stop."""
    settings = Settings()
    provider = telemetry.configure("serving", settings.telemetry)
    try:
        asyncio.run(lifecycle.run(build(settings), settings.process.ready_file))
    finally:
        provider.shutdown()


if __name__ == "__main__":
    main()
