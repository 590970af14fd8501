"""``python -m services.registry``"""

from libs.process import run_service
from services.registry.app import build
from services.registry.settings import Settings

if __name__ == "__main__":
    run_service("registry", Settings, build)
