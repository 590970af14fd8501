"""Models of several files, and models with modules of their own, from the command line to the answer of a replica."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import onnx
import pytest

from tests.e2e.platforms import PATIENT_GATEWAY, RunningPlatform, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TRAIN = """
import joblib, numpy, sys
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from helpers.features import Squares
rows = numpy.arange(12.0).reshape(6, 2)
model = make_pipeline(Squares(), LinearRegression()).fit(rows, (rows**2).sum(1))
joblib.dump(model, sys.argv[1])
"""
SQUARES = """
from sklearn.base import BaseEstimator, TransformerMixin
class Squares(TransformerMixin, BaseEstimator):
    def fit(self, rows, labels=None):
        return self
    def transform(self, rows):
        return rows ** 2
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    ports = {"SERVING_METRICS_PORT": str(free_port())}
    running = RunningPlatform(tmp_path_factory.mktemp("mr") / "home", "embedded", **ports, **PATIENT_GATEWAY)
    running.up()
    try:
        yield running
    finally:
        running.down()
        running.close()
        assert running.processes() == []


def answer(platform, name, rows):
    end = time.monotonic() + 60
    while True:
        response = platform.http.post(f"/v1/models/{name}:predict", json={"instances": rows})
        if response.status_code == 200 or time.monotonic() > end:
            assert response.status_code == 200, response.text
            return response.json()["predictions"]
        time.sleep(0.2)


def test_a_graph_with_its_weights_in_another_file_is_served_and_a_damaged_copy_of_them_is_fetched_again(platform, tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    weights = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "W")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, size]) for name, size in (("X", 3), ("Y", 2))]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["X", "W"], ["Y"])], "g", ends[:1], ends[1:], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    platform.cli("models", "upload", str(folder), "--name", "big", "--wait")
    platform.serve("big")
    rows, wanted = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[0.0, 1.0], [4.0, 5.0]]
    assert answer(platform, "big", rows) == wanted

    files = platform.home / "cache" / "artifacts" / f"{platform.version('big')['files']['sha256']}.files"
    data = bytearray((files / "model.onnx.data").read_bytes())
    data[-1] ^= 0x40
    (files / "model.onnx.data").chmod(0o644)
    (files / "model.onnx.data").write_bytes(data)
    (runner,) = [each for each in platform.processes() if str(files) in " ".join(each.cmdline())]
    os.kill(runner.pid, signal.SIGKILL)
    assert answer(platform, "big", rows) == wanted
    assert (files / "model.onnx.data").read_bytes() != bytes(data)
    port, end = platform.environment["SERVING_METRICS_PORT"], time.monotonic() + 30
    counted = 'millrace_damaged_copies_total{kind="artifact",service="serving"} 1.0'
    while counted not in (shown := httpx.get(f"http://127.0.0.1:{port}/metrics").text):
        assert time.monotonic() < end, [line for line in shown.splitlines() if "damaged" in line]
        time.sleep(0.5)


def test_a_pipeline_with_a_class_of_ones_own_package_is_served(platform, tmp_path):
    package = tmp_path / "helpers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "features.py").write_text(SQUARES)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path / "model.joblib")], env=environment, check=True)
    refused = platform.cli("models", "upload", str(tmp_path / "model.joblib"), "--name", "squares", "--wait", check=False)
    assert refused.returncode == 1
    assert "the artifact needs 'helpers.features.Squares'" in refused.stderr
    assert "upload it with --code" in refused.stderr
    example = tmp_path / "example.json"
    example.write_text(json.dumps({"instances": [[1.0, 2.0]]}))
    said = platform.cli(
        *("models", "upload", str(tmp_path / "model.joblib"), "--name", "squares", "--code", str(package)),
        *("--example", str(example), "--wait"),
    )
    assert "squares@2 is validated" in said.stdout
    platform.serve("squares")
    assert np.allclose(answer(platform, "squares", [[1.0, 2.0], [3.0, 4.0]]), [5.0, 25.0])
    assert not list((platform.home / "cache" / "artifacts").rglob("*.pyc"))
