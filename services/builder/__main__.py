"""``python -m services.builder``"""

from libs.process import run_service
from services.builder.app import build
from services.builder.settings import Settings

if __name__ == "__main__":
    run_service("builder", Settings, build)
