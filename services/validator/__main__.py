"""``python -m services.validator``"""

from libs.process import run_service
from services.validator.app import build
from services.validator.settings import Settings

if __name__ == "__main__":
    run_service("validator", Settings, build)
