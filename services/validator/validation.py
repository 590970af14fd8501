"""The second gate: the version loads and answers, caged, in the environment that was built for it."""

import asyncio
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from libs.errors import DeadlineExceededError, MillraceError, TransientError
from libs.inference import examples, v1, v2
from libs.inference.batches import is_batchable
from libs.inference.client import RunnerClient
from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError, RunnerStartError
from libs.inference.requests import InferRequest, InferResponse
from libs.inference.supervisor import RunnerProcess, RunnerSpec
from libs.runner.cage import REQUIRED_LAYERS, CageSpec
from libs.runner.wire import NUMPY_DTYPES, Arrays
from schemas.inference import DeclaredSignature, Signature, TensorSpec
from schemas.registry import MAX_EXAMPLE_BYTES, ArtifactFormat
from schemas.validation import Finding, Measurements
from services.validator import independence
from services.validator.rules import rejection, rejections, warning


@dataclass(frozen=True, slots=True)
class TrialLimits:
    """What a version may use while it is tried.

    Attributes
    ----------
    load_s, predict_s
        Longest time to become ready and to answer one request, in seconds.
    probe_s
        Longest time to answer the made-up rows that the signature is found with, in seconds; part of ``load_s``.
    cpu_s
        CPU time of the whole trial, in seconds.
    memory_bytes
        Private memory of the runner.
    latency_runs, latency_s
        How often the example is predicted to measure latency, and for how long at most, in seconds.
    """

    load_s: float = 60.0
    predict_s: float = 10.0
    probe_s: float = 10.0
    cpu_s: int = 120
    memory_bytes: int = 4 * 2**30
    file_size_bytes: int = 64 * 2**20
    latency_runs: int = 20
    latency_s: float = 2.0

    @property
    def cage(self) -> CageSpec:
        return CageSpec(
            memory_bytes=self.memory_bytes,
            cpu_s=self.cpu_s,
            file_size_bytes=self.file_size_bytes,
            probe_s=self.probe_s,
            required=REQUIRED_LAYERS,
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One version to try: the interpreter of its environment, its file, and what its uploader said of it.

    ``files`` is the folder that the file is in, when it is one of a set; ``code`` that of the modules beside the model.
    """

    python: Path
    artifact: Path
    format: ArtifactFormat
    example: Mapping[str, Any] | None = None
    signature: DeclaredSignature | None = None
    forbid_batching: bool = False
    limits: TrialLimits = field(default_factory=TrialLimits)
    files: Path | None = None
    code: Path | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """The verdict of the second gate, with its evidence.

    Attributes
    ----------
    golden
        ``{"request": example, "response": answer}`` in the example's own form.
    cage
        Which layers of the cage were active.
    needs_example
        Nothing that could be made up was answered, and there is no example; no verdict yet.
    """

    signature: Signature | None = None
    measurements: Measurements | None = None
    golden: dict[str, Any] | None = None
    cage: dict[str, bool] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    needs_example: bool = False

    @property
    def accepted(self) -> bool:
        return self.signature is not None and not self.needs_example and not rejections(self.findings)

    @property
    def reason(self) -> str:
        """The gravest finding, or why an example is needed, one sentence; empty when accepted."""
        grave = rejections(self.findings) or tuple(finding for finding in self.findings if finding.rule == "trial.no_example")
        return grave[0].message if grave else ""


StartRunner = Callable[[RunnerSpec], Awaitable[RunnerProcess]]


async def validate(trial: Trial, start: StartRunner = RunnerProcess.start, work_dir: Path | None = None) -> Validation:
    """Try a version. Whatever the model does becomes a finding; nothing of it survives the trial.

    ``work_dir`` is where the runner's scratch directory is made.

    Raises
    ------
    TransientError
        This machine could not try it; the version is not to blame.
    """
    with tempfile.TemporaryDirectory(prefix="trial-", dir=work_dir) as folder:
        spec = _runner_spec(trial, Path(folder))
        try:
            runner = await start(spec)
        except RunnerStartError as error:
            return Validation(findings=(_start_finding(error, trial.limits),))
        try:
            return await _try(runner, trial)
        finally:
            await runner.stop(grace_s=0)  # it has said all there is to say


def _runner_spec(trial: Trial, folder: Path) -> RunnerSpec:
    scratch = folder / "scratch"
    scratch.mkdir()
    return RunnerSpec(
        python=trial.python,
        artifact=trial.artifact,
        format=trial.format.value,
        runner_id="trial",
        token=secrets.token_hex(16),
        address="tcp:127.0.0.1:0",
        scratch=scratch,
        log=folder / "log",
        cage=trial.limits.cage,
        start_timeout_s=trial.limits.load_s,
        signature=trial.signature,
        files=trial.files,
        code=trial.code,
    )


def _start_finding(error: RunnerStartError, limits: TrialLimits) -> Finding:
    """Say why a runner did not become ready; a sandbox that cannot be had is ours to repair, not the model's.

    Raises
    ------
    TransientError
        The runner could not even be tried here.
    """
    if error.kind in ("cage", "not_started"):
        raise TransientError(f"versions cannot be tried on this machine: {error.message}") from error
    message = error.message
    if error.kind == "memory":
        message = f"{message} ({limits.memory_bytes // 2**20} MiB)"
    if error.kind == "missing_module":
        message = f"{message}; if it is your own, upload it with --code, else name its package with --requirements"
    return rejection("trial.start", message, kind=error.kind, module=error.module)


async def _try(runner: RunnerProcess, trial: Trial) -> Validation:
    ready = runner.ready
    assert ready is not None  # noqa: S101 (a started runner has reported; for the type checker)
    verdict = Validation(
        signature=ready.signature,
        cage={layer: state == "active" for layer, state in ready.cage.items()},
        findings=tuple(warning("trial.load_warning", text) for text in ready.warnings),
    )
    client = runner.client()
    try:
        return await _predict(runner, client, trial, verdict, ready.load_s)
    finally:
        await client.close()


async def _predict(runner: RunnerProcess, client: RunnerClient, trial: Trial, verdict: Validation, load_s: float) -> Validation:
    assert verdict.signature is not None  # noqa: S101 (set by the caller; for the type checker)
    request: InferRequest | None
    try:
        request = _read_example(trial.example, verdict.signature)
    except InvalidInputError as error:
        return _with(verdict, rejection("trial.example", f"the example does not fit the model: {error.message}"))
    if request is None:
        return await _without_example(runner, client, trial, verdict, load_s)
    try:
        answer = await _ask(client, request.inputs, request.outputs, trial.limits)
        latencies, steady = await _measure(client, request, answer, trial.limits)
    except MillraceError as error:
        return _with(verdict, await _predict_finding(error, runner, trial.limits))
    if not steady:
        verdict = _with(verdict, warning("trial.not_deterministic", "the model answered the same example differently when asked again"))
    rows = independence.first_rows(request.inputs) or independence.varied(request.inputs)
    try:
        verdict = await _judge_rows(client, trial, verdict, [rows] if rows else [])
    except MillraceError as error:
        return _with(verdict, await _predict_finding(error, runner, trial.limits))
    verdict = replace(verdict, measurements=await _measurements(client, load_s, latencies))
    return _with_golden(verdict, trial.example or {}, request, answer)


async def _without_example(runner: RunnerProcess, client: RunnerClient, trial: Trial, verdict: Validation, load_s: float) -> Validation:
    """Ask for a made-up row, to see whether the model answers at all; one that refuses it may still be a good model."""
    assert verdict.signature is not None  # noqa: S101 (set by the caller; for the type checker)
    try:
        sample = _read_sample(runner, verdict.signature)
        inputs, answer = await _answered(client, verdict.signature, sample, trial.limits)
        latencies, _ = await _measure(client, InferRequest(inputs), answer, trial.limits)
        verdict = await _judge_rows(client, trial, verdict, [sample] if sample else [])
    except (InvalidInputError, ModelError) as error:
        text = f"there is no example, and the model refused a made-up row: {error.message}{_at(error)}"
        return replace(_with(verdict, warning("trial.no_example", text, **_exception(error))), needs_example=True)
    except MillraceError as error:
        return _with(verdict, await _predict_finding(error, runner, trial.limits))
    return replace(verdict, measurements=await _measurements(client, load_s, latencies))


def _read_sample(runner: RunnerProcess, signature: Signature) -> Arrays | None:
    """Rows of values that the model remembers, such as the categories of its encoders; None if it tells none that fit."""
    assert runner.ready is not None  # noqa: S101 (a started runner has reported; for the type checker)
    try:
        sample = runner.ready.sample
        return None if sample is None else independence.first_rows(v1.from_document({"inputs": sample}, signature).inputs)
    except InvalidInputError:
        return None


async def _answered(client: RunnerClient, signature: Signature, sample: Arrays | None, limits: TrialLimits) -> tuple[Arrays, InferResponse]:
    """Return the made-up row that the model answers, with the answer: one of zeros, else of what it remembers, else of other values.

    Raises
    ------
    InvalidInputError, ModelError
        It refuses all; what it says to the zeros, which is the easiest to understand.
    """
    zeros = made_up_inputs(signature)
    try:
        return zeros, await _ask(client, zeros, None, limits)
    except (InvalidInputError, ModelError) as refusal:
        for rows in [*([sample] if sample else []), independence.made_up_rows(signature)]:
            row = {name: array[:1] for name, array in rows.items()}
            try:
                return row, await _ask(client, row, None, limits)
            except (InvalidInputError, ModelError):
                continue
        raise refusal from None


async def _judge_rows(client: RunnerClient, trial: Trial, verdict: Validation, sets: list[Arrays]) -> Validation:
    """Find out whether rows are independent, by these sets of rows and by made-up ones; the signature says it.

    Raises
    ------
    MillraceError
        The model neither answered nor refused: it hung, or its runner is gone.
    """
    signature = verdict.signature
    assert signature is not None  # noqa: S101 (set by the caller; for the type checker)
    if not is_batchable(signature) or trial.forbid_batching:
        return replace(verdict, signature=signature.model_copy(update={"batchable": False}))
    outputs = tuple(spec.name for spec in signature.outputs)

    async def ask(inputs: Arrays) -> Arrays:
        return (await _ask(client, inputs, outputs, trial.limits)).outputs

    nullable = [spec.name for spec in signature.inputs if spec.dtype is not None]
    reason = await independence.judge(ask, [*sets, independence.made_up_rows(signature)], nullable)
    if reason is None:
        return verdict
    finding = warning("trial.rows_depend", f"rows are not independent, so requests are never joined or cut: {reason}")
    return replace(_with(verdict, finding), signature=signature.model_copy(update={"batchable": False}))


def _with(verdict: Validation, finding: Finding) -> Validation:
    return replace(verdict, findings=(*verdict.findings, finding))


def _read_example(example: Mapping[str, Any] | None, signature: Signature) -> InferRequest | None:
    return None if example is None else examples.read(example, signature)


def made_up_inputs(signature: Signature) -> Arrays:
    """Return one row of zeros (empty strings for ``BYTES``) for every input."""
    return {spec.name: _zeros(spec) for spec in signature.inputs}


def _zeros(spec: TensorSpec) -> Any:
    shape = tuple(1 if size < 0 else size for size in spec.shape)
    return np.full(shape, b"", dtype=object) if spec.datatype == "BYTES" else np.zeros(shape, NUMPY_DTYPES[spec.datatype])


async def _ask(client: RunnerClient, inputs: Arrays, outputs: tuple[str, ...] | None, limits: TrialLimits) -> InferResponse:
    return await client.infer(inputs, outputs=outputs, timeout_s=limits.predict_s)


async def _measure(client: RunnerClient, request: InferRequest, first: InferResponse, limits: TrialLimits) -> tuple[list[float], bool]:
    """Ask again and again; return the seconds each answer took, and whether all were the same.

    Other trials may run at the same time (``VALIDATOR_CONCURRENCY``): with more of them than cores, answers take longer than they would
    alone.
    """
    latencies: list[float] = []
    steady = True
    deadline = time.monotonic() + limits.latency_s
    while len(latencies) < limits.latency_runs and time.monotonic() < deadline:
        started = time.perf_counter()
        answer = await _ask(client, request.inputs, request.outputs, limits)
        latencies.append(time.perf_counter() - started)
        steady = steady and _equal(first.outputs, answer.outputs)
    return latencies, steady


def _equal(first: Arrays, second: Arrays) -> bool:
    return all(
        array.shape == second[name].shape
        and (array.tobytes() == second[name].tobytes() if array.dtype.kind != "O" else (array == second[name]).all())
        for name, array in first.items()
    )


async def _measurements(client: RunnerClient, load_s: float, latencies: list[float]) -> Measurements:
    try:
        peak = int((await client.metadata())["memory_peak_bytes"])
    except (MillraceError, KeyError, TypeError, ValueError):
        peak = 0
    ordered = sorted(latencies)
    return Measurements(
        load_s=load_s, predict_p50_s=quantile(ordered, 0.5), predict_p99_s=quantile(ordered, 0.99), peak_memory_bytes=max(peak, 0)
    )


def quantile(ordered: list[float], share: float) -> float | None:
    """Return the smallest value that at least ``share`` of the values do not exceed (nearest rank); ``None`` of none."""
    if not ordered:
        return None
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


async def _predict_finding(error: MillraceError, runner: RunnerProcess, limits: TrialLimits) -> Finding:
    """Say what the model did instead of answering the example."""
    if isinstance(error, DeadlineExceededError):
        return rejection("trial.predict", f"the model did not answer its example within {limits.predict_s:g} s", kind="timeout")
    if isinstance(error, RunnerGoneError):
        try:
            status = await asyncio.wait_for(runner.wait_exit(), 1.0)
        except TimeoutError:
            return rejection("trial.predict", "the model closed its connection instead of answering its example", kind="closed")
        message = f"the model's process {status.description} instead of answering its example"
        return rejection("trial.predict", message, kind="exited", code=status.code)
    if isinstance(error, InvalidInputError):
        return rejection("trial.example", f"the model refuses its example: {error.message}{_at(error)}", **_exception(error))
    return rejection("trial.predict", f"{error.message}{_at(error)}, on its example", kind="raised", **_exception(error))


def _at(error: MillraceError) -> str:
    """Where in the model's own code it came from, as it follows a message."""
    line = error.line if isinstance(error, InvalidInputError | ModelError) else None
    return "" if line is None else f" ({line})"


def _exception(error: MillraceError) -> dict[str, str]:
    """Evidence: the type of what the model raised, and the line of its own code, where they are known."""
    if not isinstance(error, InvalidInputError | ModelError):
        return {}
    return {name: text for name, text in (("exception", error.exception), ("line", error.line)) if text is not None}


def _with_golden(verdict: Validation, example: Mapping[str, Any], request: InferRequest, answer: InferResponse) -> Validation:
    """Keep the example and its answer, if they are small enough to travel in an event."""
    if examples.is_v2(example):
        body, _ = v2.render(answer, replace(request, binary_data_output=False, binary_data={}), "", "")
    else:
        body = v1.render(answer, request.groups)
    if len(body) > MAX_EXAMPLE_BYTES:
        text = f"the answer to the example has {len(body)} bytes and is not kept; {MAX_EXAMPLE_BYTES} are the limit"
        return _with(verdict, warning("trial.golden_size", text))
    return replace(verdict, golden={"request": dict(example), "response": orjson.loads(body)})
