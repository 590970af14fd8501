"""The demo where nothing but Python packages can be had: on the embedded broker. Part of ``make test``."""

import pytest

from tests.e2e.platforms import RunningPlatform


@pytest.mark.timeout(600)
def test_the_demo_succeeds_on_the_embedded_broker_and_leaves_nothing_behind(tmp_path):
    platform = RunningPlatform(tmp_path / "home", "embedded")
    try:
        done = platform.cli("demo", "--broker", "embedded", timeout_s=540)
    finally:
        platform.cli("down", check=False)
        platform.close()
    assert "Every step held" in done.stdout
    assert "EMBEDDED" in done.stdout + done.stderr
    assert platform.processes() == []
