"""Small packages in a directory that stands in for the package index, so that uv works for real and without a network."""

import base64
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest


class PackageDirectory:
    """Wheels and source distributions made on the spot; uv finds these and nothing else once ``use`` was called."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        settings = self._root.with_suffix(".toml")
        settings.write_text(f'no-index = true\nfind-links = ["{self._root}"]\n')
        monkeypatch.setenv("UV_CONFIG_FILE", str(settings))
        monkeypatch.setenv("UV_CACHE_DIR", str(cache))

    def add_wheel(self, name: str, version: str = "1.0", *, requires: tuple[str, ...] = (), source: str = "") -> str:
        """A wheel with one module; returns its pin with its hash, a line of a lock."""
        module = name.replace("-", "_")
        info = f"{module}-{version}.dist-info"
        metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
        files = {
            f"{module}/__init__.py": source or f"version = {version!r}\n",
            f"{module}/tests/test_it.py": "assert True\n",
            f"{info}/METADATA": "".join(metadata),
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        files[f"{info}/RECORD"] = "".join(f"{path},{_hashed(content)}\n" for path, content in files.items()) + f"{info}/RECORD,,\n"
        path = self._root / f"{module}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for file, content in files.items():
                wheel.writestr(zipfile.ZipInfo(file, (2020, 1, 1, 0, 0, 0)), content)
        return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"

    def add_source(self, name: str, setup: str, version: str = "1.0") -> str:
        """A source distribution, whose ``setup.py`` would run if it were built; returns its pin with its hash."""
        path = self._root / f"{name}-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            for file, text in {"setup.py": setup, "PKG-INFO": metadata}.items():
                entry = tarfile.TarInfo(f"{name}-{version}/{file}")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
        return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def program(path: Path, shell: str) -> Path:
    """An executable that does what ``shell`` says, in the place of uv."""
    path.write_text(f"#!/bin/sh\n{shell}\n")
    path.chmod(0o755)
    return path


def _hashed(content: str) -> str:
    """Hash and size of a file as ``RECORD`` has them."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).decode().rstrip("=")
    return f"sha256={digest},{len(content.encode())}"
