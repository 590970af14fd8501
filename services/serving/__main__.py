"""``python -m services.serving``"""

from libs.process import run_service
from services.serving.app import build
from services.serving.settings import Settings

if __name__ == "__main__":
    run_service("serving", Settings, build)
