"""``millrace demo``: a model's whole way, from a file to live predictions, with every step checked.

Read ``tell`` first: it is the story. Each step below it does one thing with a client that anybody could write.
"""

import json
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import joblib
import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import format_trace_id
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from libs import telemetry
from libs.cli import output
from libs.cli.client import Client, Json
from libs.cli.endpoints import deploy_version
from libs.cli.errors import CommandError
from libs.cli.models import upload_version
from libs.cli.plain_kafka import Listener, Message, PlainKafka, cloudevent_headers
from libs.cli.progress import Progress, banner
from libs.cli.session import Session, connect, send_spans, trace_provider
from libs.cli.settings import CliSettings
from libs.cli.trace_sink import TraceSink
from libs.cli.traces import Jaeger, Span, tree
from libs.local import platform
from libs.local.settings import LocalSettings
from schemas.inference import InferenceResult
from schemas.registry import Artifact, CommandRefused, RegisterVersion, VersionAlreadyRegistered, VersionSpec
from schemas.topics import COMMANDS, EVENTS, inference_requests, inference_results
from schemas.validation import VersionNeedsExample, VersionRejected, VersionValidated

MODEL = ENDPOINT = "cancer"
LIBRARIES = ("scikit-learn", "numpy", "scipy", "joblib")
"""What the model's answers depend on. Without this list Millrace would infer it from the file, but not down to the last bit of a sum."""

STREAMED_RECORDS = 1_000
REQUEST_TYPE = "org.example.cancer.sample.taken.v1"
"""CloudEvents type of our inference requests. It is the producer's own: the topic says what is to be done with them."""

EVENT_TIMEOUT_S = 300.0
RESULT_TIMEOUT_S = 60.0
SURPLUS_S = 1.0
"""How much longer we listen once every record is answered, to see that none is answered twice."""

TRACE_TIMEOUT_S = 15.0
"""Services send their spans every five seconds; three times that is plenty."""

TRACED = ("millrace-cli", "millrace-gateway", "millrace-runner")
"""Services that have a span in the trace of every prediction of ours."""


class StepFailedError(CommandError):
    """Something that the demo promises did not hold."""


class Traces(Protocol):
    """Where spans can be looked up: Jaeger, or this process."""

    def spans_so_far(self, trace_id: str) -> list[Span]:
        """The spans of a trace that have arrived."""
        ...


@dataclass(frozen=True)
class Trained:
    """A model, the samples it has never seen, shape ``(n_samples, 30)``, and what it says of them here, in this process."""

    model: Pipeline
    samples: NDArray[np.float64]
    labels: list[int]
    probabilities: list[list[float]]


def run(settings: LocalSettings, *, keep: bool) -> None:
    """Start the platform if it does not run, tell the story, and stop the platform again unless it is to be kept.

    SIGTERM is taken as Ctrl-C: what was started is stopped.

    Raises
    ------
    MillraceError
        When a step did not hold; the message says which and why.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    with TraceSink() as sink, running_platform(sending_to(sink.url, settings, keep=keep), keep=keep) as status:
        cli = CliSettings(home=settings.home).model_copy(update={"url": status.gateway})
        provider = trace_provider(cli)
        try:
            with connect(cli) as client:
                tell(client, cli, status, sink if status.jaeger == sink.url else Jaeger(cli.jaeger_url) if status.jaeger else None)
        finally:
            send_spans(provider)
        output.say(f"\nEvery step held, in {output.duration(time.monotonic() - began)}.")
        say_what_next(settings, status, keep=keep)


def tell(client: Client, settings: CliSettings, status: platform.PlatformStatus, traces: Traces | None) -> None:
    """The story."""
    kafka = PlainKafka(status.bootstrap_servers)

    title("Train a model here, as anybody would")
    trained = train()

    title("Upload it and watch its events until it answers at an endpoint")
    with traced("upload and deploy") as trace_id:
        session = Session(client, settings, trace_id)
        uploaded = upload(session, trained)
        deploy(session, uploaded)

    title("Predict over HTTP, and compare with the model in this process")
    check_v1(client, trained)
    check_v2(client, trained, uploaded)

    title("Predict by publishing a CloudEvent with a plain Kafka client")
    check_cloudevent(kafka, trained)

    title("Register another version by publishing a command event")
    register_by_event(client, kafka, trained)

    title(f"Stream {STREAMED_RECORDS:,} records through the inference topics")
    check_stream(kafka, trained)

    title("Follow one prediction through the platform")
    show_trace(client, traces, trained)


def train() -> Trained:
    """A real model on real data: 569 tumours, 30 features each, malignant (0) or benign (1); a fifth is kept for testing."""
    data = load_breast_cancer()
    train_x, test_x, train_y, test_y = train_test_split(data.data, data.target, test_size=0.2, stratify=data.target, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000)).fit(train_x, train_y)
    say(f"StandardScaler + LogisticRegression on {len(train_x)} samples; {model.score(test_x, test_y):.1%} right on {len(test_x)} others")
    return Trained(model, test_x, model.predict(test_x).tolist(), model.predict_proba(test_x).tolist())


def upload(session: Session, trained: Trained) -> Json:
    """The model's file becomes a validated version, with an environment of its own that holds the libraries it was trained with."""
    body = {"example": {"instances": trained.samples[:2].tolist()}, "requirements": pins()}
    with saved(trained.model, "cancer.joblib") as path:
        view, is_new = upload_version(session, path, MODEL, body, wait=True, report=say_stage)
    existed = "" if is_new else " (the same content was uploaded before, so it is the version that exists)"
    say(f"{MODEL}@{view['version']} is {view['status']}{existed}")
    return view


def deploy(session: Session, uploaded: Json) -> None:
    """The version answers at the endpoint; creating or deploying what is there already changes nothing."""
    session.client.create_endpoint(ENDPOINT)
    view = deploy_version(session, ENDPOINT, {"model": MODEL, "version": uploaded["version"]}, wait=True, report=say_stage)
    say(f"endpoint {ENDPOINT} answers with {MODEL}@{view['version']}: {session.client.url}/v1/models/{ENDPOINT}:predict")


def check_v1(client: Client, trained: Trained) -> None:
    """All test samples in one V1 request; the answer holds the labels."""
    started = time.monotonic()
    answer = client.predict(ENDPOINT, to_json({"instances": trained.samples.tolist()}))
    equal("V1 labels", answer.body["predictions"], trained.labels)
    say(f"V1: {len(trained.labels)} labels equal, in {output.duration(time.monotonic() - started)}, answered by {answer.model_version}")


def check_v2(client: Client, trained: Trained, uploaded: Json) -> None:
    """The same in one V2 (Open Inference Protocol) request, which can ask for probabilities too."""
    tensor = {
        "name": uploaded["signature"]["inputs"][0]["name"],
        "shape": list(trained.samples.shape),
        "datatype": "FP64",
        "data": trained.samples.ravel().tolist(),
    }
    started = time.monotonic()
    answer = client.predict(ENDPOINT, to_json({"inputs": [tensor], "outputs": [{"name": "predict"}, {"name": "predict_proba"}]}))
    outputs = {tensor["name"]: tensor for tensor in answer.body["outputs"]}
    equal("V2 labels", outputs["predict"]["data"], trained.labels)
    equal("V2 probabilities", np.reshape(outputs["predict_proba"]["data"], (-1, 2)).tolist(), trained.probabilities)
    took = output.duration(time.monotonic() - started)
    say(f"V2: {len(trained.labels)} labels and {2 * len(trained.labels)} probabilities equal to the last bit, in {took}")


def check_cloudevent(kafka: PlainKafka, trained: Trained) -> None:
    """One inference request on the endpoint's topic, one result with its id on the other."""
    request_id = str(uuid.uuid4())
    requests, results = inference_requests(ENDPOINT).name, inference_results(ENDPOINT).name
    with kafka.listen(results) as answers:
        started = time.monotonic()
        headers = cloudevent_headers(request_id, REQUEST_TYPE, telemetry.current_traceparent())
        kafka.publish(requests, request_id, {"instances": trained.samples.tolist(), "outputs": ["predict_proba"]}, headers)
        kafka.flush()
        message = next((message for message in answers.read(RESULT_TIMEOUT_S) if request_of(message) == request_id), None)
    if message is None:
        raise StepFailedError(f"no result for {request_id} arrived on {results} within {RESULT_TIMEOUT_S:.0f} s")
    took = output.duration(time.monotonic() - started)
    equal("probabilities over Kafka", completed(message).predictions, trained.probabilities)
    say(f"{requests} → {results}: {2 * len(trained.labels)} probabilities equal to the last bit, in {took}")


def register_by_event(client: Client, kafka: PlainKafka, trained: Trained) -> None:
    """Everything that can be asked over HTTP can be asked by a command event; what came of it is on the events topic."""
    data = load_breast_cancer()
    stricter = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1_000)).fit(data.data, data.target)
    with saved(stricter, "cancer-stricter.joblib") as path:
        artifact = Artifact(**client.upload_artifact(path))
    spec = VersionSpec(
        artifact=artifact,
        example={"instances": trained.samples[:2].tolist()},
        requirements=tuple(pins()),
        description="Registered by an event.",
    )
    command = RegisterVersion(model_name=MODEL, spec=spec)
    command_id = str(uuid.uuid4())
    with kafka.listen(EVENTS.name) as facts:
        previous = time.monotonic()
        kafka.publish(COMMANDS.name, command.entity, command.model_dump(mode="json"), cloudevent_headers(command_id, command.event_type))
        kafka.flush()
        say(f"published {command.event_type} to {COMMANDS.name}")
        for fact in facts.read(EVENT_TIMEOUT_S):
            if fact.headers.get("ce_correlationid") != command_id:
                continue
            say_stage(fact.headers["ce_type"].removeprefix("millrace."), time.monotonic() - previous)
            previous = time.monotonic()
            match fact.headers["ce_type"]:
                case VersionValidated.event_type | VersionAlreadyRegistered.event_type:
                    return
                case VersionRejected.event_type | VersionNeedsExample.event_type | CommandRefused.event_type:
                    raise StepFailedError(f"the command was not carried out: {fact.value['reason']}")
    raise StepFailedError(f"{MODEL} was not validated within {EVENT_TIMEOUT_S:.0f} s of the command event")


def check_stream(kafka: PlainKafka, trained: Trained) -> None:
    """One record per sample and request id: each must be answered exactly once, with what the model says here."""
    asked = {f"sample-{uuid.uuid4()}": index % len(trained.samples) for index in range(STREAMED_RECORDS)}
    with kafka.listen(inference_results(ENDPOINT).name) as answers:
        started = time.monotonic()
        for request_id, index in asked.items():
            headers = {"ce_id": request_id}
            kafka.publish(inference_requests(ENDPOINT).name, request_id, {"instances": [trained.samples[index].tolist()]}, headers)
        kafka.flush()
        answered = collect(answers, set(asked))
        took_s = time.monotonic() - started
        surplus = [message for message in answers.read(SURPLUS_S) if request_of(message) in asked]
    if surplus:
        raise StepFailedError(f"{len(surplus)} of {len(asked)} records were answered more than once")
    for request_id, message in answered.items():
        equal(f"answer to {request_id}", completed(message).predictions, [trained.labels[asked[request_id]]])
    say(f"{len(answered):,} answered, each exactly once with the equal value: {len(answered) / took_s:,.0f} records/s")


def collect(answers: Listener, wanted: set[str]) -> dict[str, Message]:
    """The answer to each wanted request id."""
    answered: dict[str, Message] = {}
    for message in answers.read(RESULT_TIMEOUT_S):
        request_id = request_of(message)
        if request_id in answered:
            raise StepFailedError(f"{request_id} was answered more than once")
        if request_id in wanted:
            answered[request_id] = message
        if len(answered) == len(wanted):
            return answered
    raise StepFailedError(f"{len(wanted) - len(answered)} of {len(wanted)} records were not answered within {RESULT_TIMEOUT_S:.0f} s")


def show_trace(client: Client, traces: Traces | None, trained: Trained) -> None:
    """One more prediction, and its trace as a tree; a platform that was running before us, or stays after us, may not keep any."""
    with traced("predict") as trace_id:
        client.predict(ENDPOINT, to_json({"instances": trained.samples[:1].tolist()}))
    if traces is None:
        say(f"trace {trace_id}: nobody keeps traces here, because there was no `jaeger` on PATH when the platform started")
        say(f"with one, this shows it: millrace trace {trace_id}")
        return
    deadline = time.monotonic() + TRACE_TIMEOUT_S
    spans = traces.spans_so_far(trace_id)
    while missing := set(TRACED) - {span.service for span in spans}:
        if time.monotonic() > deadline:
            raise StepFailedError(f"trace {trace_id} has no span of {', '.join(sorted(missing))}, {TRACE_TIMEOUT_S:.0f} s later")
        time.sleep(0.5)
        spans = traces.spans_so_far(trace_id)
    say(f"trace {trace_id}")
    for line in tree(spans):
        say(line)


def say_what_next(settings: LocalSettings, status: platform.PlatformStatus, *, keep: bool) -> None:
    """Where to go from here."""
    output.say("\nTry next:")
    if settings.home != LocalSettings.model_fields["home"].default:
        output.say(f"  export MILLRACE_HOME={status.home}")
    if not keep:
        output.say(f"  {'millrace up':<72} the platform again (with Kafka, the model is still there)")
    for command, meaning in (
        (f"millrace models show {MODEL}@1", "what is known of the version"),
        ("millrace events tail", "every step is an event"),
        (f"millrace endpoints deploy {ENDPOINT} --model {MODEL}@2 --traffic 10 --wait", "a tenth of the traffic for the second version"),
        (f"{status.gateway}/docs", "the management API"),
        ("examples/quickstart.md", "the same with curl and a Kafka client"),
    ):
        output.say(f"  {command:<72} {meaning}")


# How the steps do it


@contextmanager
def running_platform(settings: LocalSettings, *, keep: bool) -> Iterator[platform.PlatformStatus]:
    """The platform of a home, ready; what was started here is stopped at the end, also on failure or Ctrl-C."""
    status = platform.status(settings)
    if status.is_ready:
        output.say(f"The platform in {status.home} is running already; it is left running at the end.")
        say_if_embedded(status)
        yield status
        return
    title("Start the platform")
    progress = Progress()
    status = platform.up_detached(settings, progress)
    try:
        progress.all_ready(status, f"its state is in {status.home}")
        say_if_embedded(status)
        yield status
    finally:
        if keep:
            output.say("\nThe platform is left running; stop it with: millrace down")
        else:
            output.say("\nStopping the platform (--keep leaves it running) …")
            platform.down(settings)


def sending_to(collector: str, settings: LocalSettings, *, keep: bool) -> LocalSettings:
    """Settings of a platform that sends its spans to our collector, unless another takes them or the platform outlives us."""
    is_taken = settings.otlp_endpoint or shutil.which("jaeger") or shutil.which("jaeger-all-in-one")
    return settings if keep or is_taken else settings.model_copy(update={"otlp_endpoint": collector})


def say_if_embedded(status: platform.PlatformStatus) -> None:
    """The embedded broker forgets everything; nobody shall be surprised by that."""
    if status.broker == platform.BrokerKind.EMBEDDED:
        banner("This platform runs on the EMBEDDED broker: it forgets everything when it stops.")


@contextmanager
def traced(name: str) -> Iterator[str]:
    """A trace of its own, which the requests inside join; its id."""
    with telemetry.tracer().start_as_current_span(f"millrace demo: {name}") as span:
        yield format_trace_id(span.get_span_context().trace_id)


@contextmanager
def saved(model: Pipeline, filename: str) -> Iterator[Path]:
    """The model as the file that its author would upload."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / filename
        joblib.dump(model, path)
        yield path


def pins() -> list[str]:
    """The libraries that the model was trained with, as requirements."""
    return [f"{name}=={version(name)}" for name in LIBRARIES]


def request_of(message: Message) -> str:
    """The request id that a result answers."""
    return str(message.value["request_id"])


def completed(message: Message) -> InferenceResult:
    """The result in a record; a failed one fails the step."""
    result = InferenceResult.model_validate(message.value)
    if result.status != "completed":
        raise StepFailedError(f"request {result.request_id} failed: {result.error}")
    return result


def equal(what: str, got: Any, expected: Any) -> None:
    """Exactly equal: for floating-point numbers, bit by bit."""
    if got != expected:
        raise StepFailedError(f"{what} differ from what the model says in this process: {str(got)[:120]} instead of {str(expected)[:120]}")


def to_json(body: Json) -> bytes:
    """A request body; Python writes floating-point numbers so that every bit survives."""
    return json.dumps(body).encode()


def title(text: str) -> None:
    """The heading of a step."""
    output.say(f"\n── {text}")


def say(text: str) -> None:
    """A line of a step."""
    output.say(f"   {text}")


def say_stage(name: str, seconds: float) -> None:
    """A stage of a step, and the seconds it took."""
    say(f"  {name:<36} {output.duration(seconds):>9}")
