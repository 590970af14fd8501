"""``python -m services.streaming``"""

import gc

from libs.process import run_service
from services.streaming.app import build
from services.streaming.settings import Settings

COLLECT_AFTER = 100_000
"""New objects after which cycles are looked for; 700 by default. The thousands of records in hand are none, and looking through them again
and again took two fifths of the process's time."""

if __name__ == "__main__":
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 50, 50)
    run_service("streaming", Settings, build)
