"""``python -m benchmarks``: every table, one after the other."""

from benchmarks import platform, registry_rebuild

registry_rebuild.main([])
platform.main([])
