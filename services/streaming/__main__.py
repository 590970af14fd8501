"""``python -m services.streaming``"""

from libs.process import run_service
from services.streaming.app import build
from services.streaming.settings import Settings

if __name__ == "__main__":
    run_service("streaming", Settings, build)
