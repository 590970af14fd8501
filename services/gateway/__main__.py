"""``python -m services.gateway``"""

import sys

import uvloop

from libs import lifecycle, telemetry
from libs.errors import MillraceError
from services.gateway.app import build
from services.gateway.settings import Settings


def main() -> None:
    """Run the gateway until it is told to stop."""
    settings = Settings()
    provider = telemetry.configure("gateway", settings.telemetry)
    try:
        uvloop.run(lifecycle.run(build(settings).components, settings.process.ready_file))
    except MillraceError as error:
        sys.exit(f"gateway: {error}")
    finally:
        provider.shutdown()


if __name__ == "__main__":
    main()
