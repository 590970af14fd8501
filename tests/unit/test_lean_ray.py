"""Ray Serve without pandas."""

import subprocess
import sys

SCRIPT = """
import sys
import libs.lean_ray
import ray.serve._private.controller, ray.serve._private.replica
assert "pandas" not in sys.modules
import pandas
assert pandas.DataFrame
"""


def test_serve_is_imported_without_pandas_and_pandas_can_be_had_afterwards():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
