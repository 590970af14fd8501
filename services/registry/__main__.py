"""``python -m services.registry``"""

import asyncio

from libs import lifecycle, telemetry
from services.registry.app import build
from services.registry.settings import Settings


def main() -> None:
    """Run the registry until it is told to stop."""
    settings = Settings()
    provider = telemetry.configure("registry", settings.telemetry)
    try:
        asyncio.run(lifecycle.run(build(settings), settings.process.ready_file))
    finally:
        provider.shutdown()


if __name__ == "__main__":
    main()
