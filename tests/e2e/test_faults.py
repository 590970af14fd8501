"""Replicas that die and models that hang, while clients go on asking."""

import json
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException

import pytest

from tests.e2e.platforms import PATIENT_GATEWAY, RunningPlatform, cancer_model, dumped, samples
from tests.e2e.slow_models import looping_model
from tests.integration.artifact_gate import held_back

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HANG = 1e10
HANGS_AFTER_S = 10
"""So long a model may be busy with one request before it is taken for hung."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    home = tmp_path_factory.mktemp("mr") / "home"
    running = RunningPlatform(home, "kafka", SERVING_PREDICT_TIMEOUT_S=str(HANGS_AFTER_S), **PATIENT_GATEWAY)
    running.up()
    try:
        yield running
    finally:
        running.down()
        running.close()
        assert running.processes() == []


class Clients:
    """Closed-loop clients, each with a connection of its own; all together at a pace, if one is given."""

    def __init__(self, platform: RunningPlatform, path: str, body: bytes, number: int = 32, per_s: float | None = None) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._port, self._path, self._body = platform.port, path, body
        self._period_s = number / per_s if per_s else 0.0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(place / number,)) for place in range(number)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def until_answered(self, more: int) -> None:
        """Return once so many more have been answered."""
        enough = self.answered + more
        wait_until(lambda: self.answered >= enough, f"{enough} answers")

    def _ask(self, phase: float) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=120)
        due = time.monotonic() + phase * self._period_s
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._period_s, time.monotonic())
            try:
                connection.request("POST", self._path, self._body)
                answer = connection.getresponse()
                text = answer.read()
                failure = "" if answer.status == 200 else f"{answer.status} {text!r}"
            except (OSError, HTTPException) as error:
                failure = repr(error)
                connection.close()
            with self._lock:
                self.answered += not failure
                if failure:
                    self.failures.append(failure)
        connection.close()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {timeout_s} s"
        time.sleep(0.1)


def test_clients_do_not_notice_that_one_of_two_replicas_is_killed_again_and_again(platform, tmp_path):
    content = dumped(cancer_model(), tmp_path / "m.joblib")
    platform.upload(content, "twins", example={"instances": samples()[:1].tolist()})
    platform.version_when("twins", "validated")
    platform.cli("endpoints", "create", "twins")
    platform.cli("endpoints", "deploy", "twins", "--model", "twins", "--min-replicas", "2", "--max-replicas", "2", "--wait")
    path, body = "/v1/models/twins:predict", json.dumps({"instances": samples()[:1].tolist()}).encode()
    with Clients(platform, path, body) as most:
        began = time.monotonic()
        time.sleep(3)
        per_s = most.answered / (time.monotonic() - began)
    assert most.failures == []
    print(f"{per_s:.0f} requests per second without pause; the rest at half of that")
    with Clients(platform, path, body, per_s=per_s / 2) as clients:
        for _ in range(4):
            next_death_s = time.monotonic() + 10  # the pace of the deaths is what is tested
            wait_until(lambda: len(platform.replicas("twins")) == 2, "two replicas")
            with held_back(platform.artifact_of("twins")):
                platform.runners("twins")[0].kill()
                wait_until(lambda: len(platform.replicas("twins")) == 1, "one replica")
                clients.until_answered(600)
            time.sleep(max(0.0, next_death_s - time.monotonic()))
    assert clients.answered > 2_000
    assert len(clients.failures) <= clients.answered / 10_000, clients.failures[:5]


def test_a_model_that_hangs_costs_its_caller_504_at_the_deadline_and_is_replaced(platform):
    platform.upload(looping_model(), "loops", filename="model.onnx", example={"instances": [[0.0, 1.0]]})
    platform.version_when("loops", "validated")
    platform.serve("loops")
    url = "/v1/models/loops:predict"
    assert platform.http.post(url, json={"instances": [[1, 2]]}).json() == {"predictions": [3.0]}
    (before,) = platform.runners("loops")
    started = time.monotonic()
    answer = platform.http.post(url, json={"instances": [[HANG, 1]]}, headers={"x-request-timeout-ms": "500"})
    took_s = time.monotonic() - started
    assert answer.status_code == 504, answer.text
    assert took_s < HANGS_AFTER_S, "the deadline, and not the end of the runner, is what ended it"
    # Others wait while the replica is replaced, and are answered.
    answer = platform.http.post(url, json={"instances": [[1, 2]]}, headers={"x-request-timeout-ms": "60000"})
    assert answer.status_code == 200, answer.text
    assert not before.is_running()


def test_every_request_has_exactly_one_end_also_after_faults(platform):
    platform.cli("requests", "audit")
