"""Compiles the packages of an environment to bytecode; a program of the standard library, run by the environment's own base interpreter.

    python -I -S bytecode.py TREE KEPT INDEX COUNT

It compiles every ``COUNT``-th module below ``TREE``, from ``INDEX`` on, but no tests. What it compiles it also keeps in ``KEPT``, under the
SHA-256 of the source, and a module that any environment had before is a hard link instead of work. It runs nothing of what it compiles.

References
----------
PEP 552: bytecode that is valid for the source with a given hash, whatever the source's date and place. It is not checked again at import
(``UNCHECKED_HASH``), because environments do not change.
"""

import contextlib
import hashlib
import importlib.util
import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

_NOT_COMPILED = frozenset({"tests", "test", "__pycache__"})


def compile_tree(tree: Path, kept: Path, index: int, count: int) -> None:
    """Compile the share ``index`` of ``count`` equal shares of the modules below ``tree``; a module that does not compile is left out."""
    kept = kept / f"{sys.implementation.cache_tag}-{importlib.util.MAGIC_NUMBER.hex()}"
    for number, source in enumerate(_modules(tree)):
        if number % count == index:
            with contextlib.suppress(OSError, RecursionError, py_compile.PyCompileError):
                _compile(source, kept)


def _modules(tree: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(tree):
        names[:] = sorted(set(names) - _NOT_COMPILED)
        yield from (Path(directory, file) for file in sorted(files) if file.endswith(".py"))


def _compile(source: Path, kept: Path) -> None:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    known, bytecode = kept / digest[:2] / digest, Path(importlib.util.cache_from_source(source))
    bytecode.parent.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):  # not known, or as many links to it as the file system allows
        os.link(known, bytecode)
        return
    py_compile.compile(str(source), str(bytecode), doraise=True, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    known.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.link(bytecode, known)


if __name__ == "__main__":
    compile_tree(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
