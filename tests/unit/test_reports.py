import subprocess
import sys
from pathlib import Path

from libs import reports

WRITING = """
import pathlib, sys
from libs import reports

for _ in range(400):
    reports.write(pathlib.Path(sys.argv[1]), [reports.EndpointReport("cancer", is_ready=True)] * 50)
"""


def test_workers_that_write_one_report_do_not_break_each_other_s(tmp_path: Path) -> None:
    path = tmp_path / "run" / "endpoints.json"
    reports.write(path, [reports.EndpointReport("cancer", is_ready=True)])
    writers = [subprocess.Popen([sys.executable, "-c", WRITING, str(path)]) for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        found = reports.read_endpoints(path)
        assert found is not None
        assert {each.name for each in found} == {"cancer"}
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert [each.name for each in path.parent.iterdir()] == ["endpoints.json"]
