"""The management API over a real registry and a log in memory."""

import asyncio
import hashlib
import json

import pytest

from libs.errors import TransientError
from libs.messaging import cloudevents
from schemas.environment import VersionBuilt
from schemas.registry import CreateEndpoint, DeleteEndpoint, DeploymentStatus, DeployVersion, UndeployVersion
from schemas.serving import DeploymentRemoved
from schemas.topics import COMMANDS, DLQ
from schemas.validation import VersionInspected, VersionNeedsExample
from services.gateway.app import StateFollower
from services.gateway.commands import Commander
from tests.unit.gateway.conftest import LOCK, NOW, SIGNATURE

ARTIFACT = {"sha256": "a" * 64, "size_bytes": 1, "filename": "m.joblib"}


async def test_an_artifact_is_stored_and_described(world):
    content = b"x" * 3_000_000
    digest = hashlib.sha256(content).hexdigest()
    answer = await world.http.post(
        "/api/v1/artifacts", params={"filename": "m.joblib"}, content=content, headers={"x-millrace-sha256": digest}
    )
    assert (answer.status_code, answer.json()) == (201, {"sha256": digest, "size_bytes": len(content), "filename": "m.joblib"})
    assert await world.store.exists(digest)


async def test_artifacts_that_are_refused_leave_nothing(tmp_path, make):
    async with make(tmp_path) as world:
        post = world.http.post
        wrong = await post("/api/v1/artifacts", content=b"abc", headers={"x-millrace-sha256": "0" * 64})
        assert (wrong.status_code, "not the announced" in wrong.json()["error"]) == (400, True)
        assert (await post("/api/v1/artifacts", content=b"abc", headers={"x-millrace-sha256": "xyz"})).status_code == 400
        assert (await post("/api/v1/artifacts", content=b"")).json() == {"error": "the artifact is empty"}
        for name in ("a/b", "..\\x", "a\nb", "n" * 256, ""):
            assert (await post("/api/v1/artifacts", params={"filename": name}, content=b"x")).status_code == 400
        assert world.store.contents == {}


async def test_an_artifact_over_the_limit_is_a_413(tmp_path, make, monkeypatch):
    monkeypatch.setenv("ARTIFACTS_MAX_BYTES", "1000")

    async def chunks():
        for _ in range(11):
            yield b"x" * 100

    async with make(tmp_path) as world:
        for content in (b"x" * 1001, chunks()):
            answer = await world.http.post("/api/v1/artifacts", content=content)
            assert (answer.status_code, list(answer.json())) == (413, ["error"])
        assert world.store.contents == {}


async def test_registering_a_version_shows_it_at_once(world):
    artifact = await world.upload()
    body = {"artifact": artifact, "aliases": ["prod"], "example": {"instances": [[1, 2]]}, "labels": {"team": "a"}, "allow_code": True}
    answer = await world.http.post("/api/v1/models/cancer/versions", json=body)
    view = answer.json()
    assert answer.status_code == 201
    assert (view["version"], view["status"], view["pending_aliases"], view["spec"]["labels"]) == (1, "registered", ["prod"], {"team": "a"})
    assert view["spec"]["allow_code"] is True
    shown = (await world.http.get("/api/v1/models/cancer/versions/1")).json()
    assert shown == {name: value for name, value in view.items() if name != "operation_id"}
    assert (await world.http.get("/api/v1/models/cancer")).json()["versions"] == [{"version": 1, "status": "registered"}]
    assert [model["model_name"] for model in (await world.http.get("/api/v1/models")).json()["models"]] == ["cancer"]
    operation = (await world.http.get(f"/api/v1/operations/{view['operation_id']}")).json()
    assert (operation["done"], operation["outcome"]["type"]) == (True, "millrace.registry.version.registered.v1")


async def test_code_is_an_uploaded_artifact_too(world):
    artifact = await world.upload()
    code = (await world.http.post("/api/v1/artifacts", params={"filename": "helpers.py"}, content=b"X = 1")).json()
    answer = await world.http.post("/api/v1/models/cancer/versions", json={"artifact": artifact, "code": code})
    assert (answer.status_code, answer.json()["spec"]["code"]) == (201, code)
    assert (await world.http.post("/api/v1/models/cancer/versions", json={"artifact": artifact})).json()["version"] == 2
    missing = await world.http.post("/api/v1/models/cancer/versions", json={"artifact": artifact, "code": {"sha256": "0" * 64}})
    assert (missing.status_code, missing.json()["error"].startswith("there is no artifact 000")) == (404, True)


async def test_the_same_content_again_is_the_version_that_exists(world):
    body = {"artifact": await world.upload()}
    first = await world.http.post("/api/v1/models/cancer/versions", json=body)
    again = await world.http.post("/api/v1/models/cancer/versions", json=body)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["version"] == 1


async def test_a_version_without_its_artifact_is_refused(world):
    answer = await world.http.post("/api/v1/models/cancer/versions", json={"artifact": ARTIFACT})
    assert answer.status_code == 404
    assert "upload it first" in answer.json()["error"]
    artifact = await world.upload()
    answer = await world.http.post("/api/v1/models/cancer/versions", json={"artifact": {**artifact, "size_bytes": 1}})
    assert (answer.status_code, answer.json()["error"].endswith("has 7 bytes, not 1")) == (400, True)
    assert (await world.http.get("/api/v1/models/cancer")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        ("POST", "/api/v1/models/m/versions", {"artifact": ARTIFACT, "aliasses": []}, "the field 'aliasses' is not known"),
        ("POST", "/api/v1/models/m/versions", {"artifact": {**ARTIFACT, "size": 1}}, "the field 'artifact.size' is not known"),
        ("POST", "/api/v1/models/m/versions", {}, "'artifact' is missing"),
        ("POST", "/api/v1/models/m/versions", {"artifact": {**ARTIFACT, "sha256": "x"}}, "64 lower-case hexadecimal digits"),
        (
            "POST",
            "/api/v1/models/m/versions",
            {"artifact": ARTIFACT, "aliases": ["1"]},
            "1 to 128 letters, digits or '-'; starts with a lower-case",
        ),
        ("POST", "/api/v1/models/m/versions", {"artifact": ARTIFACT, "format": "exe"}, "format"),
        ("POST", "/api/v1/models/m/versions", {"artifact": ARTIFACT, "example": {"rows": []}}, "exactly one of 'instances'"),
        ("POST", "/api/v1/models/m/versions", [], "must be a JSON object"),
        ("POST", "/api/v1/endpoints", {"name": "a/b"}, "name 'a/b' is not valid: 1 to 63 letters"),
        ("POST", "/api/v1/endpoints", {"name": "a" * 300}, "1 to 63 letters"),
        ("POST", "/api/v1/endpoints", {"name": "é"}, "1 to 63 letters"),
        ("POST", "/api/v1/endpoints", {"name": 7}, "name"),
        ("POST", "/api/v1/endpoints", {"name": "e", "labels": {"a": "x" * 65}}, "labels.a: string should have at most 64 characters"),
        ("POST", "/api/v1/endpoints", {"name": "e", "labels": {"x" * 65: "a"}}, "at most 64 characters"),
        (
            "POST",
            "/api/v1/endpoints",
            {"name": "e", "labels": {str(n): "" for n in range(65)}},
            "labels: dictionary should have at most 64",
        ),
        ("POST", "/api/v1/endpoints/e/deployments", {"model": "m", "trafic_percent": 5}, "the field 'trafic_percent' is not known"),
        ("POST", "/api/v1/endpoints/e/deployments", {"model": "m", "traffic_percent": 101}, "traffic_percent"),
        ("POST", "/api/v1/endpoints/e/deployments", {"model": "m", "version": 1, "alias": "prod"}, "a version or an alias, not both"),
        ("POST", "/api/v1/endpoints/e/deployments", {"model": "m", "min_replicas": 3, "max_replicas": 2}, "less than min_replicas"),
        ("PUT", "/api/v1/endpoints/e/traffic", {"traffic": {}}, "traffic"),
        ("PUT", "/api/v1/models/m/aliases/prod", {"version": 0}, "version"),
        ("PUT", "/api/v1/models/m/aliases/Prod", {"version": 1}, "not an alias: 1 to 128 letters"),
    ],
)
async def test_a_bad_body_is_a_400_with_one_sentence(world, method, path, body, says):
    answer = await world.http.request(method, path, json=body)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert says in answer.json()["error"]
    assert not world.broker.records(COMMANDS.name)


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": NaN}', b"\xff", b"[" * 50_000, b'{"name": "\\ud800"}', b'{"name": "e"}}'])
async def test_what_is_not_json_is_a_400(world, content):
    answer = await world.http.post("/api/v1/endpoints", content=content)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


async def test_a_body_over_the_limit_is_a_413(world):
    for path in ("/api/v1/endpoints", "/api/v1/models/m/versions"):
        answer = await world.http.post(path, content=b" " * 1_000_001)
        assert (answer.status_code, list(answer.json())) == (413, ["error"])


async def test_a_body_needs_no_content_type(world):
    answer = await world.http.post(
        "/api/v1/endpoints", content=b'{"name": "e"}', headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert answer.status_code == 201


async def test_refusals_of_the_registry_keep_their_reason(world):
    answer = await world.http.delete("/api/v1/endpoints/nowhere")
    assert (answer.status_code, answer.json()) == (404, {"error": "there is no endpoint 'nowhere'"})
    await world.http.post("/api/v1/endpoints", json={"name": "e"})
    answer = await world.http.post("/api/v1/endpoints", json={"name": "e", "description": "another"})
    assert answer.status_code == 409
    artifact = await world.upload()
    await world.http.post("/api/v1/models/m/versions", json={"artifact": artifact})
    answer = await world.http.post("/api/v1/endpoints/e/deployments", json={"model": "m", "version": 1})
    assert (answer.status_code, "registered" in answer.json()["error"]) == (409, True)
    answer = await world.http.put("/api/v1/endpoints/e/traffic", json={"traffic": {"e.m.1": 50}})
    assert (answer.status_code, "sum to 100" in answer.json()["error"]) == (400, True)


async def test_aliases_move_and_go(world):
    for content in (b"one", b"two"):
        await world.http.post("/api/v1/models/m/versions", json={"artifact": await world.upload(content)})
    for number in (1, 2):
        answer = await world.http.put("/api/v1/models/m/aliases/prod", json={"version": number})
        assert (answer.status_code, answer.json()["aliases"]) == (200, {"prod": number})
        assert (await world.http.get("/api/v1/models/m/versions/prod")).json()["version"] == number
    assert (await world.http.delete("/api/v1/models/m/aliases/prod")).json()["aliases"] == {}
    assert (await world.http.delete("/api/v1/models/m/aliases/prod")).status_code == 404
    assert (await world.http.get("/api/v1/models/m/versions/prod")).status_code == 404
    answer = await world.http.post("/api/v1/models/m/versions/1:archive")
    assert (answer.status_code, answer.json()["status"]) == (200, "archived")


async def test_a_version_that_needs_an_example_takes_one(world):
    body = {"artifact": await world.upload()}
    await world.http.post("/api/v1/models/m/versions", json=body)
    await world.publish(
        VersionInspected(model_name="m", version=1, format="sklearn", requirements=(), inferred=False),
        VersionBuilt(model_name="m", version=1, environment=LOCK, reused=False, resolve_s=0, install_s=0),
        VersionNeedsExample(model_name="m", version=1, signature=SIGNATURE, reason="it refused"),
    )
    await world.until("/api/v1/models/m/versions/1", lambda view: view["status"] == "needs_example")
    await world.http.post("/api/v1/endpoints", json={"name": "e"})
    answer = await world.http.post("/api/v1/endpoints/e/deployments", json={"model": "m", "version": 1})
    assert (answer.status_code, "millrace models example m@1 FILE" in answer.json()["error"]) == (409, True)
    answer = await world.http.post("/api/v1/models/m/versions/1:example", json={"example": {"rows": []}})
    assert answer.status_code == 400
    example = {"instances": [[1, 2]]}
    answer = await world.http.post("/api/v1/models/m/versions/1:example", json={"example": example})
    assert (answer.status_code, answer.json()["status"], answer.json()["spec"]["example"]) == (200, "needs_example", example)
    answer = await world.http.post("/api/v1/models/m/versions", json={**body, "example": example})
    assert (answer.status_code, answer.json()["version"], answer.json()["spec"]["example"]) == (200, 1, example)
    answer = await world.http.post("/api/v1/models/m/versions/2:example", json={"example": example})
    assert answer.status_code == 404


async def test_the_uploader_may_forbid_batching(world):
    body = {"artifact": await world.upload(), "forbid_batching": True}
    answer = await world.http.post("/api/v1/models/m/versions", json=body)
    assert answer.json()["spec"]["forbid_batching"] is True


async def test_the_life_of_a_deployment(world):
    deployment = await world.deployed(0.0)
    assert (deployment["deployment_id"], deployment["status"]) == ("cancer.cancer.1", "pending")
    assert "lock" not in deployment["environment"]
    endpoint = (await world.http.get("/api/v1/endpoints/cancer")).json()
    assert (endpoint["traffic"], endpoint["deployments"][0]["traffic_percent"]) == ({"cancer.cancer.1": 100}, 100)
    assert (await world.http.put("/api/v1/endpoints/cancer/traffic", json={"traffic": {"1": 100}})).status_code == 200
    assert (await world.http.put("/api/v1/endpoints/cancer/traffic", json={"traffic": {"2": 100}})).status_code == 404
    assert (await world.http.delete("/api/v1/endpoints/cancer")).status_code == 409
    assert (await world.http.delete("/api/v1/endpoints/cancer/deployments/cancer.cancer.1")).status_code == 409
    for _ in range(2):
        answer = await world.http.delete("/api/v1/endpoints/cancer/deployments/cancer.cancer.1", params={"force": "true"})
        assert (answer.status_code, answer.json()["status"]) == (200, DeploymentStatus.REMOVING)
    assert (await world.predict([[1, 2]])).status_code == 503
    await world.publish(DeploymentRemoved(endpoint_name="cancer", deployment_id="cancer.cancer.1", generation=2))
    await world.until("/api/v1/endpoints/cancer", lambda view: view["deployments"] == [])
    assert (await world.http.delete("/api/v1/endpoints/cancer")).status_code == 200
    assert (await world.http.get("/api/v1/endpoints/cancer")).status_code == 404
    assert (await world.http.get("/api/v1/endpoints")).json() == {"endpoints": []}


def part(world, kind):
    """The component of a kind."""
    return next(component for component in world.gateway.components if isinstance(component, kind))


def overtake(world, *commands_and_facts):
    """Let the next command be followed at once by others, so that the gateway sees what they led to all together."""
    events = [cloudevents.new_event(data, "/someone", now=NOW) for data in commands_and_facts]
    producer = part(world, Commander)._producer

    async def send(records):
        await world.broker.append([*records, *[cloudevents.write(event) for event in events]])

    producer.send = send


async def test_a_deployment_that_is_being_removed_again_is_shown_so(world):
    await world.validated("m")
    await world.http.post("/api/v1/endpoints", json={"name": "e"})
    overtake(world, UndeployVersion(endpoint_name="e", deployment_id="e.m.1"))
    answer = await world.http.post("/api/v1/endpoints/e/deployments", json={"model": "m"})
    assert (answer.status_code, answer.json()["status"]) == (201, "removing")


async def test_a_deployment_that_is_gone_again_is_answered_with_what_was_decided(world):
    await world.validated("m")
    await world.http.post("/api/v1/endpoints", json={"name": "e"})
    gone = DeploymentRemoved(endpoint_name="e", deployment_id="e.m.1", generation=2)
    overtake(world, UndeployVersion(endpoint_name="e", deployment_id="e.m.1"), gone)
    answer = await world.http.post("/api/v1/endpoints/e/deployments", json={"model": "m"})
    assert (answer.status_code, answer.json()["deployment_id"], answer.json()["generation"]) == (201, "e.m.1", 1)
    assert (await world.http.get("/api/v1/endpoints/e")).json()["deployments"] == []


async def test_a_removal_that_was_overtaken_by_a_deployment_is_answered(world):
    await world.validated("m")
    await world.http.post("/api/v1/endpoints", json={"name": "e"})
    await world.http.post("/api/v1/endpoints/e/deployments", json={"model": "m"})
    overtake(world, DeployVersion(endpoint_name="e", model_name="m"))
    answer = await world.http.delete("/api/v1/endpoints/e/deployments/e.m.1")
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")


async def test_an_endpoint_that_is_gone_again_is_answered_with_what_was_decided(world):
    overtake(world, DeleteEndpoint(endpoint_name="e"))
    answer = await world.http.post("/api/v1/endpoints", json={"name": "e", "labels": {"team": "a"}})
    assert (answer.status_code, answer.json()["endpoint_name"], answer.json()["labels"]) == (201, "e", {"team": "a"})


async def test_a_split_of_an_endpoint_that_is_gone_again_is_answered_with_what_was_decided(world):
    await world.deployed(0.0)
    overtake(world, DeleteEndpoint(endpoint_name="cancer", force=True))
    answer = await world.http.put("/api/v1/endpoints/cancer/traffic", json={"traffic": {"1": 100}})
    assert (answer.status_code, answer.json()["traffic"]) == (200, {"cancer.cancer.1": 100})


async def test_the_lock_is_shown_on_request(world):
    await world.validated("m")
    assert "lock" not in (await world.http.get("/api/v1/models/m/versions/1")).json()["environment"]
    full = (await world.http.get("/api/v1/models/m/versions/1", params={"view": "full"})).json()
    assert full["environment"]["lock"] == "numpy==2.4.0\n"
    assert (await world.http.get("/api/v1/models/m/versions/1", params={"view": "x"})).status_code == 400


async def test_a_silent_registry_is_a_202_with_an_operation_to_poll(tmp_path, make):
    async with make(tmp_path, registry=False) as world:
        for headers in ({"prefer": "wait=0"}, {"prefer": "respond-async"}):
            answer = await world.http.post("/api/v1/endpoints", json={"name": "e"}, headers=headers)
            assert answer.status_code == 202
            operation = (await world.http.get(answer.json()["operation_url"])).json()
            assert operation == {"id": answer.json()["operation_id"], "done": False}


async def test_operations_of_commands_that_came_by_the_log_can_be_asked_for(world):
    event = cloudevents.new_event(CreateEndpoint(endpoint_name="e"), "/someone", now=NOW, event_id="mine")
    await world.broker.append([cloudevents.write(event)])
    operation = await world.until("/api/v1/operations/mine", lambda view: view["done"])
    assert operation["outcome"]["data"]["endpoint_name"] == "e"
    assert (await world.http.get("/api/v1/operations/unknown")).status_code == 404


@pytest.mark.parametrize("is_heard", [True, False])
@pytest.mark.parametrize("is_written", [True, False])
async def test_a_command_that_may_have_been_written_is_not_refused(tmp_path, make, is_written, is_heard):
    async with make(tmp_path, broker_timeout_s=0.2) as world:
        producer = part(world, Commander)._producer
        send = producer.send

        async def lose_the_answer(records):
            if is_written:
                await send(records)
            if is_heard:
                raise TransientError("the connection was lost")
            await asyncio.Event().wait()

        producer.send = lose_the_answer
        answer = await world.http.post("/api/v1/endpoints", json={"name": "e"}, headers={"prefer": "wait=1"})
        if is_written:
            assert (answer.status_code, answer.json()["endpoint_name"]) == (201, "e")
        else:
            assert answer.status_code == 202
            assert (await world.http.get(answer.json()["operation_url"])).json()["done"] is False


async def test_a_command_that_may_have_been_written_is_a_202_with_an_operation_to_poll(tmp_path, make):
    async with make(tmp_path, registry=False) as world:
        producer = part(world, Commander)._producer
        send = producer.send

        async def lose_the_answer(records):
            await send(records)
            raise TransientError("the connection was lost")

        producer.send = lose_the_answer
        answer = await world.http.post("/api/v1/endpoints", json={"name": "e"}, headers={"prefer": "wait=0"})
        assert answer.status_code == 202
        (record,) = world.broker.records(COMMANDS.name)
        assert record.header("ce_id") == answer.json()["operation_id"]


async def test_a_broker_that_is_away_is_a_503_and_not_a_hang(tmp_path, make):
    async with make(tmp_path, broker_timeout_s=0.02) as world:

        async def refuse():
            raise TransientError("the broker is away")

        async def hang():
            await asyncio.Event().wait()

        producer = part(world, Commander)._producer
        for connect in (refuse, hang):
            producer.connect = connect
            answer = await world.http.post("/api/v1/endpoints", json={"name": "e"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_a_command_that_cannot_be_handled_is_in_the_dead_letters_and_can_be_replayed(world):
    event = cloudevents.new_event(CreateEndpoint(endpoint_name="e"), "/someone", now=NOW, event_id="bad")
    record = cloudevents.write(event)
    spoiled = type(record)(record.topic, record.key, b'{"endpoint_name": "a/b"}', record.headers)
    await world.broker.append([spoiled])
    operation = await world.until("/api/v1/operations/bad", lambda view: view["done"])
    assert "endpoint_name" in operation["error"]
    (letter,) = (await world.http.get("/api/v1/dead-letters")).json()["dead_letters"]
    assert (letter["origin_topic"], letter["consumer"], letter["event_id"]) == (COMMANDS.name, "registry", "bad")
    assert "value_base64" not in letter
    full = (await world.http.get(f"/api/v1/dead-letters/{letter['id']}")).json()
    assert full["value"] == '{"endpoint_name": "a/b"}'
    before = len(world.broker.records(COMMANDS.name))
    answer = await world.http.post(f"/api/v1/dead-letters/{letter['id']}:replay")
    assert (answer.status_code, answer.json()["replayed"]) == (200, True)
    replayed = world.broker.records(COMMANDS.name)[before]
    assert (replayed.key, replayed.value, replayed.headers) == (spoiled.key, spoiled.value, spoiled.headers)
    assert (await world.http.get("/api/v1/dead-letters/none")).status_code == 404
    assert world.broker.records(DLQ.name)


async def test_events_are_kept_and_can_be_filtered(world):
    first = await world.http.post("/api/v1/models/m/versions", json={"artifact": await world.upload()})
    await world.http.put("/api/v1/models/m/aliases/prod", json={"version": 1})
    await world.http.post("/api/v1/endpoints", json={"name": "e"})

    async def types(**filters):
        answer = await world.http.get("/api/v1/events", params=filters)
        return [event["type"].split(".")[-2] for event in answer.json()["events"]]

    assert await types() == ["registered", "was_set", "created"]
    assert await types(entity="m") == ["registered", "was_set"]
    assert await types(entity="m@1") == ["registered", "was_set"]
    assert await types(entity="m@2") == []
    assert await types(type="*.endpoint.*") == ["created"]
    assert await types(correlation_id=first.json()["operation_id"]) == ["registered"]
    (event,) = (await world.http.get("/api/v1/events", params={"entity": "e"})).json()["events"]
    assert event["specversion"] == "1.0"
    assert event["causationid"] == event["correlationid"]
    assert event["subject"] == event["data"]["endpoint_name"] == "e"


async def test_a_bug_is_a_500_that_tells_nothing_and_is_logged(world, monkeypatch, caplog):
    def broken(_name):
        raise RuntimeError("a secret detail")

    catalog = part(world, StateFollower)._apply.__self__
    monkeypatch.setattr(catalog, "model", broken)
    world.http._transport.raise_app_exceptions = False
    answer = await world.http.get("/api/v1/models/m")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert list(answer.json()) == ["error"]
    assert "a secret detail" in caplog.text


@pytest.mark.parametrize(
    "value",
    [
        b"NaN",
        b"Infinity",
        b"1e999",
        b"9" * 400,
        b'"\\ud800"',
        b"[" * 100 + b"]" * 100,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":1,"a":2}',
        b"\xff",
    ],
)
@pytest.mark.parametrize("place", [b'"example": {"instances": %b}', b'"lineage": {"parameters": {"a": %b}}', b'"unknown": %b'])
async def test_values_that_not_every_reader_of_the_log_understands_are_refused(world, place, value):
    artifact = json.dumps(await world.upload()).encode()
    answer = await world.http.post("/api/v1/models/m/versions", content=b'{"artifact": %b, %b}' % (artifact, place % value))
    assert (answer.status_code, list(answer.json())) == (400, ["error"]), answer.text
    assert world.broker.records(COMMANDS.name) == ()


async def test_numbers_of_64_bits_arrive_exactly(world):
    body = {"artifact": await world.upload(), "lineage": {"parameters": {"a": 2**64 - 1, "b": -(2**63), "c": 0.1}}}
    shown = (await world.http.post("/api/v1/models/m/versions", json=body)).json()
    assert shown["spec"]["lineage"]["parameters"] == {"a": 2**64 - 1, "b": -(2**63), "c": 0.1}


async def test_the_openapi_document_and_its_page(world):
    document = (await world.http.get("/openapi.json")).json()
    assert "/api/v1/models/{model}/versions" in document["paths"]
    assert (await world.http.get("/docs")).headers["content-type"].startswith("text/html")


async def test_one_trace_leads_from_the_request_to_the_command(world, exported):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    await world.http.post("/api/v1/endpoints", json={"name": "e"}, headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
    spans = {span.name: span for span in exported.get_finished_spans()}
    server, publish = spans["POST /api/v1/endpoints"], spans["publish millrace.commands"]
    assert publish.parent.span_id == server.context.span_id
    assert (server.kind.name, publish.kind.name) == ("SERVER", "PRODUCER")
    assert server.attributes["http.route"] == "/api/v1/endpoints"
    (command,) = world.broker.records(COMMANDS.name)
    assert command.header("traceparent") == f"00-{trace_id}-{publish.context.span_id:016x}-01"
