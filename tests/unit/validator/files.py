"""Files for the tests: real models and what is not one."""

import bz2
import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.linear_model import LogisticRegression

ROWS = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [2.0, 1.0]])
LABELS = np.array([0, 1, 0, 1])


def fitted(labels: Any = LABELS) -> LogisticRegression:
    """A real model, fitted in a millisecond."""
    return LogisticRegression(max_iter=20).fit(ROWS, labels)


def saved(value: Any, path: Path, **options: Any) -> Path:
    joblib.dump(value, path, **options)
    return path


def written(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


class Calls:
    """Pickles as a call that is made when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(content: bytes = b"x" * 5000) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", content)
    return buffer.getvalue()


def archive(*names: str) -> bytes:
    """A zip archive of such files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as files:
        for name in names:
            files.writestr(name, b"x")
    return buffer.getvalue()


def tarred(name: str) -> bytes:
    """A ``.tar.gz`` with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as files:
        files.addfile(tarfile.TarInfo(name), io.BytesIO())
    return gzip.compress(buffer.getvalue(), mtime=0)


def bomb(size_bytes: int) -> bytes:
    """A pickle of zeros that is small when compressed."""
    return gzip.compress(pickle.dumps(bytes(size_bytes), protocol=4), 9)


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def onnx_graph(*, domain: bytes = b"", tensor: bytes = b"") -> bytes:
    """A graph without nodes: enough of an ONNX file for the walk over it."""
    graph = field(2, b"g") + (field(5, tensor) if tensor else b"")
    return field(1, 8) + field(2, b"tests") + field(7, graph) + field(8, field(1, domain) + field(2, 18))


compressors = {"gzip": gzip.compress, "bz2": bz2.compress}
