"""Numbers that a process keeps of itself, and how Prometheus reads them.

``definitions`` has every metric's name, kind, unit and meaning; ``instruments`` counts; ``exposition`` writes the text; ``server`` is the
small HTTP server of ``/metrics`` for services that have no HTTP door of their own.
"""

from libs.metrics.instruments import PROCESS, Counter, Gauge, Histogram, Metrics

__all__ = ["PROCESS", "Counter", "Gauge", "Histogram", "Metrics"]
