"""``python -m services.gateway``"""

import uvloop

from libs.process import run_service
from services.gateway.app import build
from services.gateway.settings import Settings

if __name__ == "__main__":
    run_service("gateway", Settings, lambda settings: build(settings).components, uvloop.run)
