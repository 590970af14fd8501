from pathlib import Path

import pytest

from libs.local import jaeger


def test_without_a_jaeger_on_path_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jaeger.find(tmp_path / "jaeger.yaml") is None


@pytest.mark.parametrize("name", ["jaeger", "jaeger-all-in-one"])
def test_whichever_is_found_listens_on_loopback_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / name
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = jaeger.find(tmp_path / "jaeger.yaml")
    assert found is not None
    assert found.argv[0] == str(binary)
    said = " ".join(found.argv) + ((tmp_path / "jaeger.yaml").read_text() if name == "jaeger" else "")
    assert "127.0.0.1:4318" in said
    assert "127.0.0.1:16686" in said
    assert "0.0.0.0" not in said
