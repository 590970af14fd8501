"""What a caged artifact cannot do, tried from inside one; and what happens when a layer is missing."""

import contextlib
import json
import sys
import sysconfig
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from libs.inference.errors import ModelError, RunnerStartError
from libs.runner import cage
from tests.unit.runner.models import STRICT, Call, on_request, row_sums, running, spec

from libs.inference.supervisor import RunnerProcess  # isort: skip

linux = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
ROW = {"input": np.zeros((1, 3))}


@linux
@pytest.mark.parametrize(
    ("attempt", "refused_with"),
    [
        ("__import__('socket').socket()", "PermissionError"),
        ("__import__('socket').socket(__import__('socket').AF_UNIX)", "PermissionError"),
        ("__import__('socket').socketpair(__import__('socket').AF_UNIX, __import__('socket').SOCK_DGRAM)", "PermissionError"),
        ("__import__('os').utime(__import__('numpy').__file__)", "PermissionError"),
        ("1 / (1 + __import__('ctypes').CDLL(None).prctl(1, 0))", "ZeroDivisionError"),
        ("__import__('subprocess').run(['/bin/true'])", "PermissionError"),
        ("__import__('os').fork()", "PermissionError"),
        ("__import__('os').execv('/bin/true', ['true'])", "PermissionError"),
        ("__import__('os').kill(__import__('os').getppid(), 9)", "PermissionError"),
        ("open('/etc/shadow').read()", "PermissionError"),
        ("open(f\"/proc/{__import__('os').getppid()}/environ\").read()", "PermissionError"),
        ("open('/tmp/outside', 'w')", "PermissionError"),
        ("__import__('os').listdir('/')", "PermissionError"),
        ("__import__('os').chmod('.', 0o777)", "PermissionError"),
        ("__import__('os').setuid(12345)", "PermissionError"),
        ("open('big', 'wb').write(bytes(1 << 21))", "OSError"),
        ("bytearray(2 << 30)", "the model needs more memory than it is allowed"),
        ("[open('/dev/null') for _ in range(300)]", "OSError"),
        ("__import__('sys').exit(3)", "SystemExit"),
    ],
)
async def test_the_cage_refuses(attempt: str, refused_with: str, tmp_path: Path) -> None:
    async with running(on_request(attempt), tmp_path) as runner:
        client = runner.client()
        with pytest.raises(ModelError, match=refused_with):
            await client.infer(ROW, timeout_s=10)
        await client.ping()
        await client.close()


@linux
async def test_what_a_model_needs_is_allowed(tmp_path: Path) -> None:
    attempt = "(open('note', 'w').write('x'), __import__('threading').Thread(target=print).start(), X.sum(1))[-1]"
    async with running(on_request(attempt), tmp_path) as runner:
        client = runner.client()
        assert (await client.infer(ROW, timeout_s=10)).outputs["predict"].tolist() == [0.0]
        await client.close()
    assert (tmp_path / "scratch" / "note").read_text() == "x"


@linux
async def test_every_layer_says_that_it_is_active(tmp_path: Path) -> None:
    async with running(row_sums(), tmp_path) as runner:
        assert runner.ready is not None
        assert runner.ready.cage == dict.fromkeys(cage.LINUX_LAYERS, "active")


@linux
async def test_a_socket_on_load_is_refused_and_said(tmp_path: Path) -> None:
    import socket

    with pytest.raises(RunnerStartError, match="tried something that the sandbox forbids") as caught:
        await RunnerProcess.start(spec(Call(socket.create_connection, ("127.0.0.1", 9)), tmp_path))
    assert caught.value.kind == "forbidden"


@linux
@pytest.mark.parametrize("file", ["planted.pth", "sitecustomize.py"])
async def test_what_an_environment_runs_at_start_runs_in_the_cage(file: str, tmp_path: Path) -> None:
    python = planted(tmp_path / "environment", file)
    without_landlock = replace(STRICT, required=(), layers=tuple(layer for layer in cage.LINUX_LAYERS if layer != "landlock"))
    async with running(row_sums(), tmp_path, python=python, cage=without_landlock) as runner:
        assert "PermissionError" in runner.log_tail()
        assert "a socket was made" not in runner.log_tail()


@linux
async def test_a_package_cannot_name_another_standard_library(tmp_path: Path) -> None:
    """A wheel may bring a ``pyvenv.cfg``, where an interpreter that is started through the environment finds its own modules."""
    python = planted(tmp_path / "environment", "planted.pth")
    (tmp_path / "environment" / "pyvenv.cfg").write_text(f"home = {tmp_path / 'environment' / 'bin'}\n")
    encodings = Path(python).parents[1] / "lib" / python.name / "encodings"
    encodings.mkdir()
    (encodings / "__init__.py").write_text(f"import posix; posix.mkdir({str(tmp_path / 'ran')!r})\n")
    (encodings.parent / "os.py").touch()
    with contextlib.suppress(RunnerStartError):
        await (await RunnerProcess.start(spec(row_sums(), tmp_path, python=python))).stop()
    assert not (tmp_path / "ran").exists()


def planted(environment: Path, file: str) -> Path:
    """An environment with the packages of this one and a line of code that Python runs when it starts; returns its interpreter."""
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    (packages / file).write_text("import socket; socket.socket(); print('a socket was made', flush=True)\n")
    return environment / "bin" / packages.parent.name


async def test_a_missing_required_layer_refuses_the_start(tmp_path: Path) -> None:
    unmet = replace(STRICT, required=("vacuum",))
    with pytest.raises(RunnerStartError, match="the sandbox layer 'vacuum' is required but is not active: unknown layer") as caught:
        await RunnerProcess.start(spec(row_sums(), tmp_path, cage=unmet))
    assert caught.value.kind == "cage"


async def test_a_layer_that_was_not_asked_for_is_reported_as_such(tmp_path: Path) -> None:
    async with running(row_sums(), tmp_path, cage=cage.CageSpec(layers=("limits",))) as runner:
        assert runner.ready is not None
        assert runner.ready.cage["seccomp"] == "not requested"


def test_the_specification_survives_the_command_line() -> None:
    spec_of_all = cage.CageSpec(memory_bytes=1, cpu_s=2, file_size_bytes=3, open_files=4, required=("limits",))
    assert cage.CageSpec.from_json(spec_of_all.to_json()) == spec_of_all
    assert json.loads(spec_of_all.to_json())["cpu_s"] == 2


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_a_program_the_kernel_takes(machine: str) -> None:
    assert 0 < len(cage.build_filter(machine, 1234)) // 8 < 4096


def test_a_machine_without_a_list_of_system_calls_has_no_filter() -> None:
    with pytest.raises(OSError, match="riscv64"):
        cage.build_filter("riscv64", 1)
