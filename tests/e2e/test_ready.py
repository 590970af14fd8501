"""What ``up`` and ``status`` call ready: a deployed endpoint answers from then on. Real Kafka, Ray and runners."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.platforms import PATIENT_GATEWAY, RunningPlatform, cancer_model, dumped, samples

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

QUICK = {**PATIENT_GATEWAY, "GATEWAY_REPLICA_WAIT_MS": "1"}
"""A request that finds no runner is answered 503 at once, or it would wait for what is to be seen."""


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[RunningPlatform]:
    started = RunningPlatform(tmp_path / "home", "kafka", **QUICK)
    try:
        yield started
    finally:
        started.cli("down", check=False)
        started.close()


def predicted(platform: RunningPlatform) -> int:
    return platform.http.post("/v1/models/cancer:predict", json={"instances": samples()[:1].tolist()}).status_code


def test_a_deployed_endpoint_answers_from_the_moment_that_up_says_ready(platform, tmp_path):
    platform.up()
    platform.upload(dumped(cancer_model(), tmp_path / "m.joblib"), "cancer").raise_for_status()
    platform.version_when("cancer", "validated")
    platform.serve("cancer")
    assert predicted(platform) == 200
    assert [(each["name"], each["is_ready"]) for each in platform.status()["endpoints"]] == [("cancer", True)]
    platform.down()
    began = time.monotonic()
    platform.up()
    print(f"up after a restart: {time.monotonic() - began:.1f} s")
    assert {predicted(platform) for _ in range(20)} == {200}
    status = platform.status()
    assert status["is_ready"]

    (runner,) = (each for each in platform.runners("cancer"))
    os.kill(platform.pid_of("ray"), signal.SIGKILL)
    began, saw_waiting = time.monotonic(), False
    while not ((now := platform.status())["is_ready"] and not runner.is_running()):
        saw_waiting = saw_waiting or any(each["is_awaited"] for each in now["endpoints"])
        assert time.monotonic() - began < 240, now
        time.sleep(0.2)
    print(f"ready after Ray was killed: {time.monotonic() - began:.1f} s, waiting shown: {saw_waiting}")
    assert {predicted(platform) for _ in range(20)} == {200}
    (ray,) = (part for part in now["parts"] if part["name"] == "ray")
    assert (ray["restarts"], ray["last_error"]) == (1, "it was ended by SIGKILL")
