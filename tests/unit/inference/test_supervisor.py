"""A runner from start to end, and its client, with real processes."""

import asyncio
import pickle
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from sklearn.linear_model import LogisticRegression

from libs.errors import ConfigurationError, DeadlineExceededError, UnauthenticatedError
from libs.inference.client import RunnerClient
from libs.inference.errors import InvalidInputError, ModelError, RunnerGoneError, RunnerStartError
from libs.inference.supervisor import HUNG_STATUS, RunnerExit, RunnerProcess
from tests.unit.runner.models import Call, Source, model, on_request, row_sums, running, spec

ROWS = {"input": np.array([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]])}
ROOT = Path(__file__).parents[3]
SAMPLED = f"00-{'a' * 32}-{'b' * 16}-03"


@pytest.fixture
def unix_address() -> Iterator[str]:
    """A socket path that is short enough wherever the tests run."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        yield f"unix:{folder}/s"


async def start_error(artifact: object, folder: Path, **changes: object) -> RunnerStartError:
    with pytest.raises(RunnerStartError) as caught:
        await RunnerProcess.start(spec(artifact, folder, **changes))
    return caught.value


async def test_a_runner_answers_exactly_what_the_model_says(tmp_path: Path) -> None:
    async with running(row_sums(), tmp_path) as runner:
        client = runner.client()
        answer = await client.infer(ROWS, timeout_s=10)
        assert answer.outputs["predict"].tobytes() == ROWS["input"].sum(axis=1).tobytes()
        assert answer.span is None
        assert runner.signature.inputs[0].shape == (-1, 3)
        assert [output.name for output in runner.signature.outputs] == ["predict"]
        await client.close()


async def test_requests_are_pipelined_and_answered_by_id(tmp_path: Path, unix_address: str) -> None:
    async with running(row_sums(), tmp_path, address=unix_address) as runner:
        client = runner.client()
        rows = [np.full((1, 3), float(value)) for value in range(1000)]
        answers = await asyncio.gather(*(client.infer({"input": row}, timeout_s=20) for row in rows))
        assert [answer.outputs["predict"].tolist() for answer in answers] == [[3.0 * value] for value in range(1000)]
        await client.close()


async def test_large_tensors_cross_whole(tmp_path: Path) -> None:
    async with running(row_sums(), tmp_path) as runner:
        client = runner.client()
        rows = np.random.default_rng(1).random((200_000, 3))
        answer = await client.infer({"input": rows}, timeout_s=20)
        assert np.array_equal(answer.outputs["predict"], rows.sum(axis=1))
        await client.close()


async def test_a_sampled_trace_gets_the_runners_span(tmp_path: Path) -> None:
    async with running(row_sums(), tmp_path) as runner:
        client = runner.client()
        span = (await client.infer(ROWS, timeout_s=10, traceparent=SAMPLED)).span
        assert span is not None
        assert len(span.span_id) == 16
        assert 0 < span.start_ns <= span.end_ns
        await client.close()


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"input": np.zeros((1, 4))}, None, r"input 'input' expects shape \[-1, 3\], got \[1, 4\]"),
        ({"input": np.zeros((1, 3), np.float32)}, None, "input 'input' expects FP64, got FP32"),
        ({}, None, "input 'input' is missing"),
        ({**ROWS, "x": np.zeros(1)}, None, "the model has no input 'x'; it has input"),
        (ROWS, ["predict_proba"], "the model has no output 'predict_proba'; it has predict"),
    ],
)
async def test_tensors_that_do_not_fit_are_the_callers_fault(inputs: object, outputs: object, message: str, tmp_path: Path) -> None:
    async with running(row_sums(), tmp_path) as runner:
        client = runner.client()
        with pytest.raises(InvalidInputError, match=message):
            await client.infer(inputs, outputs=outputs, timeout_s=10)  # type: ignore[arg-type]
        await client.close()


async def test_what_the_model_raises_is_told_in_one_line_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    async with running(on_request("1 / 0"), tmp_path) as runner:
        client = runner.client()
        with pytest.raises(ModelError) as caught:
            await client.infer({"input": np.zeros((1, 3))}, timeout_s=10)
        assert caught.value.message == "the model raised ZeroDivisionError: division by zero"
        assert "Traceback" in runner.log_tail()
        assert (await client.infer(ROWS, timeout_s=10)).outputs["predict"].shape == (2,)
        await client.close()


async def test_a_timeout_disturbs_no_other_request(tmp_path: Path) -> None:
    async with running(on_request("(__import__('time').sleep(0.3), X.sum(1))[1]"), tmp_path) as runner:
        client = runner.client()
        with pytest.raises(DeadlineExceededError):
            await client.infer({"input": np.zeros((1, 3))}, timeout_s=0.05)
        waiting = asyncio.create_task(client.infer({"input": np.zeros((1, 3))}))
        await asyncio.sleep(0)
        waiting.cancel()
        await client.ping(timeout_s=5)
        assert (await client.infer(ROWS, timeout_s=10)).outputs["predict"].tolist() == ROWS["input"].sum(1).tolist()
        await client.close()


async def test_a_ping_says_for_how_long_the_model_has_been_busy(tmp_path: Path) -> None:
    async with running(on_request("(__import__('time').sleep(1.0), X.sum(1))[1]"), tmp_path) as runner:
        client = runner.client()
        assert await client.ping() == 0
        asked = asyncio.create_task(client.infer({"input": np.zeros((1, 3))}, timeout_s=10))
        async with asyncio.timeout(5):
            while await client.ping() == 0:
                assert not asked.done()
        assert 0 < await client.ping() < 5
        await asked
        assert await client.ping() == 0
        await client.close()


async def test_a_stranger_is_not_answered(tmp_path: Path, unix_address: str) -> None:
    async with running(row_sums(), tmp_path, address=unix_address) as runner:
        stranger = RunnerClient(runner.address, "guess")
        with pytest.raises(UnauthenticatedError):
            await stranger.infer(ROWS, timeout_s=5)
        reader, writer = await asyncio.open_unix_connection(runner.address.removeprefix("unix:"))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"protocol" in await reader.read()
        writer.close()
        client = runner.client()
        await client.ping()
        await client.close()


async def test_an_exit_on_predict_is_seen_by_the_caller_and_by_the_supervisor(tmp_path: Path) -> None:
    async with running(on_request("__import__('os')._exit(3)"), tmp_path) as runner:
        client = runner.client()
        with pytest.raises(RunnerGoneError):
            await client.infer({"input": np.zeros((1, 3))}, timeout_s=10)
        assert await runner.wait_exit() == RunnerExit(3)
        with pytest.raises(RunnerGoneError):
            await client.infer(ROWS, timeout_s=10)


async def test_stop_lets_the_runner_finish_what_was_asked(tmp_path: Path, unix_address: str) -> None:
    async with running(on_request("(__import__('time').sleep(0.3), X.sum(1))[1]"), tmp_path, address=unix_address) as runner:
        client = runner.client()
        await client.ping()
        waiting = asyncio.create_task(client.infer({"input": np.ones((1, 3))}, timeout_s=10))
        await asyncio.sleep(0)
        await client.ping()
        assert await runner.stop() == RunnerExit(0)
        assert (await waiting).outputs["predict"].tolist() == [3.0]
    with pytest.raises(RunnerGoneError):
        await RunnerClient(unix_address, "secret-token").ping()


async def test_a_model_that_hangs_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with running(on_request("__import__('time').sleep(100)"), tmp_path) as runner:
        client = runner.client()
        with pytest.raises(DeadlineExceededError):
            await client.infer({"input": np.zeros((1, 3))}, timeout_s=0.2)
        assert (await runner.stop(grace_s=0.2)).code == -signal.SIGKILL
        await client.close()


async def test_a_runner_whose_model_hangs_ends_itself_and_says_so(tmp_path: Path) -> None:
    async with running(on_request("__import__('time').sleep(100)"), tmp_path, predict_timeout_s=0.5) as runner:
        client = runner.client()
        hung = asyncio.create_task(client.infer({"input": np.zeros((1, 3))}, timeout_s=30))
        await asyncio.sleep(0)
        behind = asyncio.create_task(client.infer(ROWS, timeout_s=30))
        with pytest.raises(DeadlineExceededError, match="has been busy with one request for more than 0.5 s"):
            await hung
        with pytest.raises(RunnerGoneError):
            await behind
        assert await asyncio.wait_for(runner.wait_exit(), 30) == RunnerExit(HUNG_STATUS)
        assert runner.log_tail().splitlines()[-1] == "the model has been busy with one request for more than 0.5 s: the runner ends itself"
        await client.close()


async def test_a_model_that_keeps_the_interpreter_to_itself_is_ended_too(tmp_path: Path) -> None:
    hangs = on_request("__import__('re').match('(a+)+$', 'a' * 60 + 'b')")
    async with running(hangs, tmp_path, predict_timeout_s=0.5) as runner:
        client = runner.client()
        with pytest.raises(RunnerGoneError):
            await client.infer({"input": np.zeros((1, 3))}, timeout_s=30)
        assert await asyncio.wait_for(runner.wait_exit(), 30) == RunnerExit(1)
        assert "Timeout" in runner.log_tail()
        await client.close()


async def test_a_model_that_is_slow_but_not_too_slow_is_let_be(tmp_path: Path) -> None:
    async with running(on_request("(__import__('time').sleep(0.1), X.sum(1))[1]"), tmp_path, predict_timeout_s=20.0) as runner:
        client = runner.client()
        answers = await asyncio.gather(*(client.infer({"input": np.ones((1, 3))}, timeout_s=30) for _ in range(3)))
        assert [answer.outputs["predict"].tolist() for answer in answers] == [[3.0]] * 3
        assert all(0.1 <= answer.model_s < 20 for answer in answers)
        await client.close()


async def test_a_runner_ends_with_its_supervisor(tmp_path: Path) -> None:
    async with running(row_sums(), tmp_path) as runner:
        assert runner._process.stdin is not None
        runner._process.stdin.close()
        assert await asyncio.wait_for(runner.wait_exit(), 5) == RunnerExit(0)


async def test_a_runner_dies_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    made = spec(on_request("__import__('time').sleep(100)"), tmp_path)
    script = tmp_path / "supervise.py"
    script.write_text(
        "import asyncio, pickle, sys\n"
        "from libs.inference.supervisor import RunnerProcess\n"
        "async def main():\n"
        "    runner = await RunnerProcess.start(pickle.loads(bytes.fromhex(sys.argv[1])))\n"
        "    print(runner.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, str(script), pickle.dumps(made).hex(), stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": str(ROOT)}
    )
    assert supervisor.stdout is not None
    pid = int(await supervisor.stdout.readline())
    supervisor.kill()
    await supervisor.wait()
    async with asyncio.timeout(5):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110 (no event of ours)
            await asyncio.sleep(0.01)


async def test_secrets_of_the_environment_do_not_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_SECRET", "do-not-tell")
    told = "print(dict(__import__('os').environ), open('/proc/self/cmdline').read()) or X.sum(1)"
    async with running(on_request(told), tmp_path) as runner:
        client = runner.client()
        await client.infer({"input": np.zeros((1, 3))}, timeout_s=10)
        await client.close()
    assert "OMP_NUM_THREADS" in runner.log_tail()
    assert "--artifact" in runner.log_tail()
    assert "do-not-tell" not in runner.log_tail()
    assert "secret-token" not in runner.log_tail()


async def test_a_missing_module_is_named(tmp_path: Path) -> None:
    artifact = tmp_path / "model.pkl"
    artifact.write_bytes(b"cno_such_library.trees\nForest\n)R.")
    error = await start_error(artifact, tmp_path)
    assert (error.kind, error.module) == ("missing_module", "no_such_library")
    assert error.message == "the artifact needs the module 'no_such_library', which its environment does not have"


async def test_a_module_missing_from_a_package_names_the_packages_version(tmp_path: Path) -> None:
    artifact = tmp_path / "model.pkl"
    artifact.write_bytes(b"cnumpy.no_such_part\nx\n)R.")
    error = await start_error(artifact, tmp_path)
    assert (
        error.message
        == f"the artifact needs the module 'numpy.no_such_part', which numpy {np.__version__} in its environment does not have"
    )


async def test_a_class_of_the_training_script_is_a_missing_name(tmp_path: Path) -> None:
    artifact = tmp_path / "model.pkl"
    artifact.write_bytes(b"c__main__\nMyModel\n)R.")
    error = await start_error(artifact, tmp_path)
    assert error.kind == "missing_name"
    assert "MyModel" in error.message


@pytest.mark.parametrize(
    ("artifact", "kind", "message"),
    [
        (Source("1 / 0"), "load_failed", "loading the artifact failed: ZeroDivisionError: division by zero"),
        (Source("__import__('sys').exit(0)"), "load_failed", "loading the artifact tried to end the process (SystemExit)"),
        (Source("__import__('os')._exit(7)"), "exited", "the runner exited with status 7 while it loaded the artifact"),
        (Source("[bytes(1 << 28) for _ in range(20)]"), "memory", "loading the artifact needs more memory than it is allowed"),
        (
            {"a": 1},
            "not_a_model",
            "the artifact holds dict, which has no predict method; save the fitted model itself, not what it is kept in",
        ),
        (LogisticRegression(), "not_a_model", "the artifact holds sklearn.linear_model._logistic.LogisticRegression, which is not fitted"),
        (model("None"), "not_a_model", "the artifact holds types.SimpleNamespace, which has no predict method"),
    ],
)
async def test_an_artifact_that_does_not_load_says_why(artifact: object, kind: str, message: str, tmp_path: Path) -> None:
    error = await start_error(artifact, tmp_path)
    assert (error.kind, error.message) == (kind, message)


async def test_a_file_that_is_no_pickle_does_not_load(tmp_path: Path) -> None:
    artifact = tmp_path / "model.joblib"
    artifact.write_text("hello world")
    assert (await start_error(artifact, tmp_path)).kind == "load_failed"


async def test_a_load_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    import time

    error = await start_error(Call(time.sleep, 100), tmp_path, start_timeout_s=1.0)
    assert (error.kind, error.message) == ("timeout", "the model did not load within 1 s")


async def test_a_format_or_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert (await start_error(row_sums(), tmp_path, format="coreml")).message == "the runner knows the formats onnx, sklearn, not 'coreml'"
    assert (await start_error(row_sums(), tmp_path, python=Path("/nonexistent/python"))).kind == "not_started"


async def test_an_address_that_cannot_be_listened_on_is_a_configuration_error(tmp_path: Path) -> None:
    for address in (f"unix:/{'x' * 200}", "unix:/nonexistent/x", "tcp:127.0.0.1:1x"):
        with pytest.raises(ConfigurationError):
            await RunnerProcess.start(spec(row_sums(), tmp_path, address=address))


async def test_a_client_without_a_runner_says_so(tmp_path: Path) -> None:
    client = RunnerClient(f"unix:{tmp_path}/nobody", "t")
    with pytest.raises(RunnerGoneError, match="no runner answers at"):
        await client.ping()


def test_pickles_of_the_helpers_do_what_they_say() -> None:
    assert pickle.loads(pickle.dumps(Source("1 + 1"))) == 2
