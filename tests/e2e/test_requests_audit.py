"""No accepted request disappears: gateways are killed under load, the broker goes away, and every request has exactly one recorded end."""

import json
import os
import signal
import threading
import time
import uuid
from collections import Counter
from contextlib import contextmanager

import httpx
import pytest

from tests.e2e.platforms import PATIENT_GATEWAY, RunningPlatform, cancer_model, dumped, samples

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROW = samples()[0].tolist()


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    home = tmp_path_factory.mktemp("mr") / "home"
    running = RunningPlatform(home, "kafka", GATEWAY_LOG_QUEUE_BYTES=str(2**20), **PATIENT_GATEWAY)
    running.up()
    try:
        assert running.upload(dumped(cancer_model(), tmp_path_factory.mktemp("model") / "cancer.joblib"), "cancer").status_code == 201
        running.version_when("cancer", "validated")
        running.serve("cancer")
        yield running
    finally:
        running.down()
        running.close()


@contextmanager
def load(platform: RunningPlatform, clients: int = 3):
    """Clients that ask without pause; gives each request's id with the status that it was answered with, 0 for none."""
    answered: dict[str, int] = {}
    stopping = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=platform.url, timeout=120) as http:
            while not stopping.is_set():
                request_id = uuid.uuid4().hex
                try:
                    answer = http.post("/v1/models/cancer:predict", json={"instances": [ROW]}, headers={"x-request-id": request_id})
                    answered[request_id] = answer.status_code
                except httpx.TransportError:
                    answered[request_id] = 0
                    stopping.wait(0.05)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def until_answered(answered: dict[str, int], more: int, timeout_s: float = 180) -> None:
    """Wait until so many more requests have been answered with success."""
    enough = Counter(list(answered.values()))[200] + more
    end = time.monotonic() + timeout_s
    while Counter(list(answered.values()))[200] < enough:
        assert time.monotonic() < end, Counter(list(answered.values()))
        time.sleep(0.1)


def audit(platform: RunningPlatform, timeout_s: float = 60) -> dict[str, str]:
    """The state of each instance once the account adds up; a broker that was just killed may not let it be read at first."""
    end = time.monotonic() + timeout_s
    while True:
        done = platform.cli("requests", "audit", "--json", check=False)
        if done.returncode == 0:
            found = json.loads(done.stdout)
            assert found["is_sound"]
            return {instance["instance"]: instance["state"] for instance in found["instances"]}
        assert time.monotonic() < end, done.stdout + done.stderr
        time.sleep(1)


def logged(platform: RunningPlatform) -> Counter[tuple[str, str]]:
    lines = platform.cli("predictions", "tail", "cancer", "--no-follow", "--json").stdout.splitlines()
    return Counter((row["request_id"], row["outcome"]) for row in map(json.loads, lines))


def logged_when_complete(platform: RunningPlatform, completed: set[str], timeout_s: float = 60) -> Counter[tuple[str, str]]:
    """The rows of the log, once these requests are among those that were completed; a gateway writes a moment after it answers."""
    end = time.monotonic() + timeout_s
    while True:
        rows = logged(platform)
        missing = completed - {request_id for request_id, outcome in rows if outcome == "completed"}
        if not missing:
            return rows
        assert time.monotonic() < end, f"{len(missing)} requests that were answered are not in the log"


def test_gateways_that_are_killed_lose_no_request(platform):
    with load(platform) as answered:
        for _ in range(2):
            until_answered(answered, 200)
            os.kill(platform.pid_of("gateway"), signal.SIGKILL)
        until_answered(answered, 200)
        audit(platform)
    assert Counter(audit(platform).values()) == {"lost": 2, "live": 1}
    rows = logged_when_complete(platform, {request_id for request_id, status in answered.items() if status == 200})
    assert set(rows.values()) == {1}


def test_predictions_go_on_without_a_broker_and_the_loss_is_accounted_for(platform):
    with load(platform) as answered:
        until_answered(answered, 50)
        broker = platform.pid_of("broker")
        os.kill(broker, signal.SIGSTOP)
        try:
            until_answered(answered, 500)
        finally:
            os.kill(broker, signal.SIGCONT)
        until_answered(answered, 100)
    assert set(answered.values()) == {200}
    audit(platform)


def test_a_broker_that_is_killed_costs_no_account(platform):
    with load(platform) as answered:
        until_answered(answered, 50)
        os.kill(platform.pid_of("broker"), signal.SIGKILL)
        until_answered(answered, 300)
        platform.pid_of("broker")
        until_answered(answered, 100)
    assert set(answered.values()) == {200}
    audit(platform)


def test_a_restart_in_good_order_leaves_nothing_to_settle(platform):
    before = audit(platform)
    platform.cli("down")
    platform.up()
    after = audit(platform)
    (stopped,) = [instance for instance, state in before.items() if state == "live"]
    (begun,) = after.keys() - before.keys()
    assert after == {**before, stopped: "stopped", begun: "live"}
