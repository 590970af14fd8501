"""``python -m benchmarks``: every table, one after the other."""

from benchmarks import artifact_store, messaging, platform, registry_rebuild

registry_rebuild.main([])
platform.main([])
messaging.main([])
artifact_store.main()
