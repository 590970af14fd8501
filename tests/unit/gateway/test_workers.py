import sys

import pytest

from libs.errors import ConfigurationError
from libs.settings import ProcessSettings
from services.gateway.settings import Settings
from services.gateway.workers import Workers, worker_settings


async def test_a_worker_that_was_ready_before_it_was_killed_is_not_ready_now(tmp_path, monkeypatch):
    settings = Settings(workers=2).model_copy(update={"process": ProcessSettings(home=tmp_path)})
    for number in range(2):
        left = worker_settings(settings, number).process.ready_file
        assert left is not None
        left.parent.mkdir(exist_ok=True)
        left.write_text("123\n")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    workers = Workers(settings)
    with pytest.raises(ConfigurationError, match="worker 0 of the gateway ended with 1 while it started"):
        await workers.start()
    await workers.stop()
