"""Replicas that die and models that hang, while clients go on asking."""

import json
import threading
import time
from dataclasses import dataclass, field

import httpx
import pytest

from tests.e2e.platforms import RunningPlatform, cancer_model, dumped, samples
from tests.e2e.slow_models import looping_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

HANG = 1e10


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    home = tmp_path_factory.mktemp("mr") / "home"
    running = RunningPlatform(home, "kafka", SERVING_PREDICT_TIMEOUT_S="5")
    running.up()
    try:
        yield running
    finally:
        running.down()
        running.close()
        assert running.processes() == []


@dataclass
class Clients:
    """Closed-loop clients at a bounded pace, each with a connection of its own."""

    url: str
    body: bytes
    number: int = 8
    pause_s: float = 0.02
    answered: int = 0
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.number)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not self._stopping.is_set():
                try:
                    answer = http.post(self.url, content=self.body)
                    failure = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
                except httpx.TransportError as error:
                    failure = repr(error)
                with self._lock:
                    self.answered += not failure
                    if failure:
                        self.failures.append(failure)
                self._stopping.wait(self.pause_s)


def test_clients_do_not_notice_that_one_of_two_replicas_is_killed_again_and_again(platform, tmp_path):
    content = dumped(cancer_model(), tmp_path / "m.joblib")
    platform.upload(content, "twins", example={"instances": samples()[:1].tolist()})
    platform.version_when("twins", "validated")
    platform.cli("endpoints", "create", "twins")
    platform.cli("endpoints", "deploy", "twins", "--model", "twins", "--min-replicas", "2", "--max-replicas", "2", "--wait")
    body = json.dumps({"instances": samples()[:1].tolist()}).encode()
    with Clients(f"{platform.url}/v1/models/twins:predict", body) as clients:
        for _ in range(4):
            until_two_runners(platform)[0].kill()
            time.sleep(10)  # the pace of the deaths is what is tested
    assert clients.answered > 2_000
    assert len(clients.failures) <= clients.answered / 10_000, clients.failures[:5]


def until_two_runners(platform):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        runners = platform.runners("twins")
        if len(runners) == 2:
            return runners
        time.sleep(0.2)
    raise AssertionError("there are not two runners again")


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
    assert took_s < 5
    # Others wait while the replica is replaced, and are answered.
    answer = platform.http.post(url, json={"instances": [[1, 2]]}, headers={"x-request-timeout-ms": "60000"})
    assert answer.status_code == 200, answer.text
    assert not before.is_running()


def test_every_request_has_exactly_one_end_also_after_faults(platform):
    platform.cli("requests", "audit")
