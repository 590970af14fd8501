"""The second gate, with real runners: what a model does when it is tried becomes a verdict."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import joblib
import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from libs.errors import TransientError
from libs.inference.errors import RunnerStartError
from libs.inference.supervisor import RunnerProcess, RunnerSpec
from schemas.inference import Signature, TensorSpec
from schemas.registry import ArtifactFormat
from schemas.validation import Severity
from services.validator.validation import Trial, TrialLimits, Validation, _read_sample, quantile, validate
from tests.unit.runner.models import Call, Source, on_request, row_sums, write
from tests.unit.runner.models import model as model_of
from tests.unit.validator.files import fitted, saved, written

LIMITS = TrialLimits(load_s=60, predict_s=1.0, cpu_s=20, memory_bytes=1 << 30, latency_runs=5, latency_s=0.5)
V1_EXAMPLE = {"instances": [[1.0, 2.0, 3.0]]}


def graph(ir_version: int = 8, opset: int = 17) -> bytes:
    """An ONNX graph that answers what it is given."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 3]) for name in ("X", "Y")]
    body = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["X"], ["Y"])], "g", ends[:1], ends[1:])
    content = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version).SerializeToString()
    assert isinstance(content, bytes)
    return content


async def tried(value: Any, tmp_path: Path, **changes: Any) -> Validation:
    path = value if isinstance(value, Path) else write(value, tmp_path / "model.pkl")
    trial = Trial(Path(sys.executable), path, ArtifactFormat.SKLEARN, example=V1_EXAMPLE, limits=LIMITS)
    return await validate(replace(trial, **changes))


async def test_a_real_model_is_accepted_with_its_evidence(tmp_path: Path) -> None:
    model = fitted()
    rows = [[0.25, 0.75], [2.0, 1.0]]
    example = {"instances": rows, "outputs": ["predict_proba"]}
    verdict = await tried(saved(model, tmp_path / "m"), tmp_path, example=example)
    assert verdict.accepted
    assert verdict.golden == {"request": example, "response": {"predictions": model.predict_proba(np.array(rows)).tolist()}}
    assert verdict.signature is not None
    assert verdict.signature.inputs[0].shape == (-1, 2)
    assert [spec.name for spec in verdict.signature.outputs] == ["predict", "predict_proba", "decision_function"]
    assert verdict.measurements is not None
    assert verdict.measurements.load_s > 0
    assert 0 < (verdict.measurements.predict_p50_s or 0) <= (verdict.measurements.predict_p99_s or 0)
    assert verdict.measurements.peak_memory_bytes > 10_000_000
    assert verdict.cage["seccomp"] is (sys.platform == "linux")
    assert verdict.findings == ()


async def test_an_example_may_be_in_the_v2_form(tmp_path: Path) -> None:
    example = {"inputs": [{"name": "input", "datatype": "FP64", "shape": [1, 3], "data": [1, 2, 3]}]}
    verdict = await tried(row_sums(), tmp_path, example=example)
    assert verdict.golden is not None
    assert verdict.golden["response"]["outputs"] == [{"name": "predict", "datatype": "FP64", "shape": [1], "data": [6.0]}]


async def test_without_an_example_the_model_is_asked_for_a_made_up_row(tmp_path: Path) -> None:
    verdict = await tried(row_sums(), tmp_path, example=None)
    assert (verdict.accepted, verdict.golden, verdict.findings) == (True, None, ())
    assert verdict.measurements is not None
    assert verdict.measurements.predict_p50_s is not None


async def test_a_model_that_refuses_a_made_up_row_needs_an_example(tmp_path: Path) -> None:
    verdict = await tried(on_request("1 / 0"), tmp_path, example=None)
    assert (verdict.accepted, verdict.needs_example) == (False, True)
    assert verdict.signature is not None
    assert (
        verdict.reason == "there is no example, and the model refused a made-up row: the model raised ZeroDivisionError: division by zero"
    )
    (finding,) = verdict.findings
    assert (finding.rule, finding.severity, finding.evidence) == ("trial.no_example", Severity.WARN, {"exception": "ZeroDivisionError"})


async def test_a_model_that_refuses_only_zeros_needs_no_example(tmp_path: Path) -> None:
    verdict = await tried(on_request("X.sum(1) if X.any() else 1 / 0"), tmp_path, example=None)
    assert (verdict.accepted, verdict.needs_example) == (True, False)


@pytest.mark.parametrize(
    ("expression", "exception"), [("1 / 0", "ZeroDivisionError"), ("{}['city']", "KeyError"), ("bytearray(2 << 30)", "MemoryError")]
)
async def test_the_type_of_what_the_model_raised_is_in_the_evidence(expression: str, exception: str, tmp_path: Path) -> None:
    verdict = await tried(on_request(expression), tmp_path)
    assert verdict.findings[-1].evidence == {"kind": "raised", "exception": exception}


async def test_the_type_of_a_refusal_is_in_the_evidence(tmp_path: Path) -> None:
    verdict = await tried(saved(fitted(), tmp_path / "m"), tmp_path, example={"instances": [[float("nan"), 1.0]]})
    assert verdict.findings[-1].evidence == {"exception": "ValueError"}


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"instances": [[1, 2]]}, "the example does not fit the model: input 'input' expects rows of 3 numbers; instances[0] has 2"),
        ({"rows": []}, "the example does not fit the model: the request needs exactly one of 'instances' and 'inputs'"),
        (
            {"instances": [["a", "b", "c"]]},
            "the example does not fit the model: input 'input' expects FP64; element [0][0] is the string 'a'",
        ),
    ],
)
async def test_an_example_that_does_not_fit_is_refused(example: dict[str, Any], reason: str, tmp_path: Path) -> None:
    verdict = await tried(row_sums(), tmp_path, example=example)
    assert (verdict.accepted, verdict.reason) == (False, reason)
    assert verdict.findings[0].rule == "trial.example"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (on_request("1 / 0"), "the model raised ZeroDivisionError: division by zero, on its example"),
        (on_request("__import__('time').sleep(100)"), "the model did not answer its example within 1 s"),
        (on_request("__import__('os')._exit(3)"), "the model's process exited with status 3 instead of answering its example"),
        (on_request("__import__('sys').exit(3)"), "the model raised SystemExit: 3, on its example"),
        (on_request("__import__('os').abort()"), "the model's process was ended by SIGABRT: it crashed or ran out of memory"),
        (on_request("bytearray(2 << 30)"), "the model needs more memory than it is allowed, on its example"),
        (on_request("__import__('socket').socket()"), "the model raised PermissionError: [Errno 13] Permission denied, on its example"),
    ],
    ids=["raises", "hangs", "exits", "sys.exit", "aborts", "hogs memory", "opens a socket"],
)
async def test_what_a_model_does_instead_of_answering_is_said(model: Any, reason: str, tmp_path: Path) -> None:
    verdict = await tried(model, tmp_path)
    assert not verdict.accepted
    assert verdict.reason.startswith(reason)
    assert verdict.findings[-1].rule == "trial.predict"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            Source("__import__('socket').create_connection(('127.0.0.1', 9))"),
            "loading the artifact tried something that the sandbox forbids",
        ),
        (Source("__import__('subprocess').run(['id'])"), "loading the artifact tried something that the sandbox forbids"),
        (Source("__import__('os')._exit(0)"), "the runner exited with status 0 while it loaded the artifact"),
        (Source("bytearray(2 << 30)"), "loading the artifact needs more memory than it is allowed (1024 MiB)"),
        (Source("[1, 2]"), "the artifact holds list, which has no predict method"),
    ],
    ids=["socket", "program", "exit", "memory", "no model"],
)
async def test_what_loading_does_is_said(model: Any, reason: str, tmp_path: Path) -> None:
    verdict = await tried(model, tmp_path)
    assert verdict.reason.startswith(reason)
    assert [finding.rule for finding in verdict.findings] == ["trial.start"]
    assert verdict.signature is None


async def test_a_program_that_was_to_run_on_load_did_not_run(tmp_path: Path) -> None:
    import os

    witness = tmp_path / "witness"
    verdict = await tried(Call(os.system, f"touch {witness}"), tmp_path)
    assert not verdict.accepted
    assert not witness.exists()


async def test_a_load_that_hangs_is_ended(tmp_path: Path) -> None:
    import time

    verdict = await tried(Call(time.sleep, 100), tmp_path, limits=replace(LIMITS, load_s=1.0))
    assert verdict.reason == "the model did not load within 1 s"


@pytest.mark.parametrize("predict", ["lambda X: __import__('time').sleep(100)", "lambda X: [0 for _ in iter(int, 1)]"])
async def test_a_predict_that_hangs_on_made_up_rows_is_found_before_the_load_limit(predict: str, tmp_path: Path) -> None:
    verdict = await tried(model_of(predict), tmp_path, limits=replace(LIMITS, probe_s=1.0))
    assert verdict.reason == "the model did not answer made-up rows within 1 s"
    assert verdict.findings[0].evidence["kind"] == "timeout"


async def test_what_scikit_learn_says_of_an_example_is_its_first_sentence(tmp_path: Path) -> None:
    verdict = await tried(saved(fitted(), tmp_path / "m"), tmp_path, example={"instances": [[float("nan"), 1.0]]})
    assert verdict.reason == "the model refuses its example: Input X contains NaN"


async def test_a_graph_that_does_not_load_is_told_without_paths_and_signatures(tmp_path: Path) -> None:
    path = written(graph(ir_version=99), tmp_path / "m")
    verdict = await tried(path, tmp_path, format=ArtifactFormat.ONNX)
    assert verdict.reason == "the graph cannot be loaded: Unsupported model IR version: 99, max supported IR version: 13"
    verdict = await tried(written(graph(opset=99), tmp_path / "m"), tmp_path, format=ArtifactFormat.ONNX)
    assert re.search(r"Opset 99 is under development .*Current official support for domain ai.onnx is till opset \d+$", verdict.reason)
    verdict = await tried(written(graph()[:-9], tmp_path / "m"), tmp_path, format=ArtifactFormat.ONNX)
    assert verdict.reason == "the graph cannot be loaded: Protobuf parsing failed"


async def test_a_missing_module_is_named_in_the_evidence(tmp_path: Path) -> None:
    verdict = await tried(written(b"clightgbm_of_nobody.sklearn\nX\n)R.", tmp_path / "m"), tmp_path)
    assert verdict.reason == (
        "the artifact needs the module 'lightgbm_of_nobody', which its environment does not have; "
        "if it is your own, upload it with --code, else name its package with --requirements"
    )
    assert verdict.findings[0].evidence == {"kind": "missing_module", "module": "lightgbm_of_nobody"}


async def test_a_model_that_answers_differently_each_time_is_warned_about(tmp_path: Path) -> None:
    verdict = await tried(on_request("X.sum(1) + __import__('time').time_ns()"), tmp_path)
    assert verdict.accepted
    assert [finding.rule for finding in verdict.findings] == ["trial.not_deterministic", "trial.rows_depend"]
    assert verdict.findings[0].severity is Severity.WARN


async def test_a_machine_that_cannot_try_a_version_does_not_blame_it(tmp_path: Path) -> None:
    async def start(spec: RunnerSpec) -> RunnerProcess:
        raise RunnerStartError("the sandbox layer 'seccomp' is required but is not active", "cage")

    trial = Trial(Path(sys.executable), write(row_sums(), tmp_path / "m"), ArtifactFormat.SKLEARN)
    with pytest.raises(TransientError, match="versions cannot be tried on this machine"):
        await validate(trial, start)


def test_quantiles_are_values_that_occurred() -> None:
    assert quantile([], 0.5) is None
    assert quantile([1.0], 0.99) == 1.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert quantile([float(value) for value in range(1, 101)], 0.99) == 99.0


async def test_a_class_that_the_file_carries_is_loaded_and_answers(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    source = "class Doubler:\n    n_features_in_ = 2\n    def predict(self, rows):\n        return rows.sum(axis=1) * 2\n"
    exec(source, namespace)
    path = tmp_path / "m"
    path.write_bytes(cloudpickle.dumps(namespace["Doubler"]()))
    verdict = await tried(path, tmp_path, example={"instances": [[1.0, 2.0], [3.0, 4.0]]})
    assert verdict.accepted, verdict.findings
    assert verdict.golden is not None


async def test_a_table_is_tried_with_the_values_that_its_model_remembers(tmp_path: Path) -> None:
    table = pd.DataFrame({"city": ["Paris", "Lyon", "Nice", "Paris"], "plan": ["free", np.nan, "pro", "free"], "age": [1.0, 2, 3, 4]})
    plan = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder())
    columns = ColumnTransformer([("c", OneHotEncoder(), ["city"]), ("p", plan, ["plan"]), ("n", StandardScaler(), ["age"])])
    model = make_pipeline(columns, DecisionTreeClassifier()).fit(table, ["a", "b", "b", "a"])
    joblib.dump(model, tmp_path / "m.joblib")
    limits = replace(LIMITS, load_s=60, predict_s=10.0)
    verdict = await tried(tmp_path / "m.joblib", tmp_path, example=None, limits=limits)
    assert (verdict.accepted, verdict.needs_example, verdict.findings) == (True, False, ())
    assert verdict.signature is not None
    assert verdict.signature.batchable


@pytest.mark.parametrize("sample", ["no object", {"city": [1]}, {"x": [{"b64": 1}]}, []])
def test_a_sample_that_makes_no_sense_is_passed_over(sample: Any) -> None:
    city = TensorSpec(name="city", datatype="BYTES", shape=(-1,), dtype="object")
    runner: Any = SimpleNamespace(ready=SimpleNamespace(sample=sample))
    assert _read_sample(runner, Signature(inputs=(city,), outputs=(city,))) is None
