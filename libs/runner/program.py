"""From the command line to the serving loop: cage first, then the environment, the libraries and the artifact.

What the supervisor hands over: a listening socket (``--fd``), a pipe for the one line that says how the start went
(``--ready-fd``), and a pipe as standard input, whose first line is ``{"token": "…", "signature": …}`` and whose end is ours; the signature
is null while nothing is known of it. Standard output and error are the model's log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import site
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import cage
from .errors import LoadError, describe_exception

if TYPE_CHECKING:
    from .formats import Model

MAX_WARNINGS = 20
MAX_SAMPLE_CHARACTERS = 256 * 1024


def main(arguments: Sequence[str]) -> int:
    """Run one runner until it is told to stop; the value is the exit status."""
    options = _parse(arguments)
    token, declared, lifeline = _take_token()
    ready = os.fdopen(options.ready_fd, "w", encoding="utf-8")
    try:
        report = cage.apply(
            cage.CageSpec.from_json(options.cage),
            environment=_environment_of(options.python),
            artifact=[options.artifact, *(folder for folder in (options.files, options.code) if folder)],
            scratch=options.scratch,
        )
    except cage.CageError as error:
        _say(ready, {"ready": False, "error": {"kind": "cage", "message": str(error)}})
        return 3
    # Only now: a thread that runs already would stay outside of the cage.
    threading.Thread(target=_exit_with_supervisor, args=(lifeline,), name="lifeline", daemon=True).start()
    _enter_environment(options.python)
    if options.code:
        # Behind everything else: it can take the place of no library.
        sys.path.append(options.code)
    return _serve(options, token, declared, ready, report)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="runner", description="Load one model and answer batches on a socket.")
    parser.add_argument("--fd", type=int, required=True, help="listening socket")
    parser.add_argument("--ready-fd", type=int, required=True, help="pipe for the line that says how the start went")
    parser.add_argument("--python", required=True, help="the environment's link to this interpreter")
    parser.add_argument("--artifact", required=True, help="path of the model's file")
    parser.add_argument("--format", required=True, help="sklearn or onnx")
    parser.add_argument("--files", default=None, help="folder that the model's file is in, when it is one of several")
    parser.add_argument("--code", default=None, help="folder of modules that the model may import")
    parser.add_argument("--scratch", default=None, help="the only directory that may be written")
    parser.add_argument("--predict-timeout-s", type=float, default=None, help="a model busy with one request for longer hangs; end then")
    parser.add_argument("--cage", default="{}", help="CageSpec as JSON")
    return parser.parse_args(arguments)


def _environment_of(python: str) -> str:
    return os.path.dirname(os.path.dirname(python))


def _enter_environment(python: str) -> None:
    """Make the environment's packages importable, as if its own link had been started; this runs ``*.pth`` files and ``sitecustomize``."""
    sys.executable = python
    os.environ.pop("__PYVENV_LAUNCHER__", None)  # set by interpreters of macOS; `site` would look beside it instead
    environment = _environment_of(python)
    if os.path.exists(os.path.join(environment, "pyvenv.cfg")):
        sys.prefix = sys.exec_prefix = environment
    site.main()


def _take_token() -> tuple[str, dict[str, Any], int]:
    """Read the token and the declared signature, and put the pipe where the model's code does not read it by mistake."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(lifeline, 1)
        if not byte:
            sys.exit(2)
        line += byte
    message = json.loads(line)
    return str(message["token"]), message.get("signature") or {}, lifeline


def _exit_with_supervisor(lifeline: int) -> None:
    """Wait for the end of the pipe: when the supervisor is gone, so are we."""
    while os.read(lifeline, 4096):
        pass
    os._exit(0)


def _say(ready: Any, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError), ready:
        ready.write(json.dumps(message) + "\n")


def _leave() -> NoReturn:
    """Leave at once: exit handlers are the model's code."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _serve(options: argparse.Namespace, token: str, declared: dict[str, Any], ready: Any, report: cage.CageReport) -> int:
    # NumPy and the model's libraries are imported inside the cage.
    from .formats import open_model
    from .server import Server

    started = time.monotonic()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            _expect_plain_arrays()
            model = open_model(options.format, options.artifact, declared, options.code)
            signature = _describe(model, cage.CageSpec.from_json(options.cage).probe_s, ready, report)
    except LoadError as error:
        traceback.print_exc()
        _say(ready, {"ready": False, "error": error.to_dict(), "cage": report.to_dict()})
        return 4
    _expect_plain_arrays()
    listener = socket.socket(fileno=options.fd)
    server = Server(model, signature, token, listener, options.predict_timeout_s, options.code)
    server.start()
    server.obey_signals()
    _say(
        ready,
        {
            "ready": True,
            "signature": signature,
            "sample": _sample(model),
            "load_s": time.monotonic() - started,
            "cage": report.to_dict(),
            "python": "{}.{}.{}".format(*sys.version_info[:3]),
            "warnings": _warning_texts(caught),
        },
    )
    try:
        server.run()
    except BaseException:  # noqa: BLE001 (a runner that cannot read is of no use: die, so that the supervisor sees it)
        traceback.print_exc()
        os._exit(70)
    _leave()


def _describe(model: Model, limit_s: float, ready: Any, report: cage.CageReport) -> dict[str, Any]:
    """Return the signature; a model that does not answer made-up rows in time cannot be interrupted, so the process ends."""

    def give_up() -> None:
        error = LoadError("timeout", f"the model did not answer made-up rows within {limit_s:g} s")
        _say(ready, {"ready": False, "error": error.to_dict(), "cage": report.to_dict()})
        os._exit(4)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        return model.describe()
    finally:
        timer.cancel()


def _sample(model: Model) -> dict[str, Any] | None:
    """Return made-up rows as the model makes them of what it remembers, as columns; None where it makes none, or large ones."""
    try:
        sample: dict[str, Any] = model.sample()  # type: ignore[attr-defined,unused-ignore]
        return sample if len(json.dumps(sample)) <= MAX_SAMPLE_CHARACTERS else None
    except Exception:  # noqa: BLE001 (what the model remembers may be anything)
        return None


def _expect_plain_arrays() -> None:
    """Silence scikit-learn on columns without names: the platform keeps columns by position, in the order of the fit."""
    warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)


def _warning_texts(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    texts = dict.fromkeys(f"{item.category.__name__}: {describe_exception(item.message)}" for item in caught)
    for text in texts:
        sys.stderr.write(text + "\n")
    return list(texts)[:MAX_WARNINGS]
