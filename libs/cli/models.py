"""``millrace models``: upload a file, see what became of it, name its versions."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libs.cli import folders, output, references
from libs.cli.errors import CommandError, StageFailedError
from libs.cli.session import Session, open_session
from libs.requirement_lines import lines_of, without_mlflow

if TYPE_CHECKING:
    from libs.cli.client import Json
    from libs.cli.stages import Report

app = typer.Typer(help="Upload models, list and name their versions.", rich_markup_mode=None, no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="The model's file, an archive or a folder with it, or an MLflow model.")],
    name: Annotated[str, typer.Option("--name", help="Model to add a version to; it is made if it does not exist.")],
    artifact_format: Annotated[str | None, typer.Option("--format", help="sklearn or onnx; else decided by content.")] = None,
    requirements: Annotated[Path | None, typer.Option("--requirements", help="requirements.txt; else inferred from the file.")] = None,
    example: Annotated[
        Path | None, typer.Option("--example", help="A request that the model must be able to answer: JSON, CSV with a header, or .npy.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option("--signature", help="Typed columns or inputs (JSON), also in MLflow's form; else found in the trial.")
    ] = None,
    code: Annotated[
        Path | None, typer.Option("--code", help="Folder of modules, package, .py file or archive that the model may import.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Consent to code that the file carries, or calls when it is loaded.")
    ] = False,
    forbid_batching: Annotated[
        bool, typer.Option("--forbid-batching", help="Never join or cut requests, whatever the trial finds.")
    ] = False,
    alias: Annotated[list[str] | None, typer.Option("--alias", help="Alias for the new version.")] = None,
    description: Annotated[str, typer.Option("--description", help="A sentence about this version.")] = "",
    label: Annotated[list[str] | None, typer.Option("--label", help="KEY=VALUE; may be repeated.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the version is validated, showing each stage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a file, or a folder of files, as the next version of a model."""
    given = folders.resolve(path)
    body: dict[str, Any] = {
        "format": artifact_format,
        "requirements": _requirements(requirements, given),
        "example": _example(example, given),
        "signature": read_json(signature) if signature else None,
        "forbid_batching": forbid_batching or None,
        "allow_code": allow_code or None,
        "aliases": alias or None,
        "description": description or None,
        "labels": references.labels(label) if label else None,
    }
    with open_session("models upload") as session:
        with _warnings_on_failure():
            given_body = {key: value for key, value in body.items() if value is not None}
            view, is_new = upload_version(session, given.path, name, given_body, code=code or given.code, wait=wait)
        _note_warnings(view)
        if as_json:
            output.show_json({**view, "trace_id": session.trace_id})
            return
        existed = "" if is_new else " (the same content was uploaded before)"
        output.say(f"{name}@{view['version']} is {view.get('status', 'registered')}{existed}")
        if wait:
            output.note(f"trace {session.trace_id}")


def upload_version(
    session: Session, path: Path, name: str, body: "Json", *, code: Path | None = None, wait: bool, report: "Report" = output.stage
) -> tuple["Json", bool]:
    """Upload and register a file or a folder, reporting progress; the version's view, and whether it is new."""
    from libs.cli.stages import VERSION_TIMEOUT_S, EventFeed, VersionStory, follow

    references.check_name(name)
    before = "" if code is None else folders.check_code(code)
    client = session.client
    started = time.monotonic()
    artifact = _uploaded(session, path)
    if code is not None:
        body = {"code": _uploaded(session, code, before), **body}
    if wait:
        report(f"uploaded {output.size(artifact['size_bytes'])}", time.monotonic() - started)
    since = datetime.now(UTC)
    if not wait:
        return client.register_version(name, {"artifact": artifact, **body})
    with EventFeed(client, name) as feed:
        view, is_new = client.register_version(name, {"artifact": artifact, **body})
        story = VersionStory(client, name, int(view["version"]))
        return follow(story, feed, report, view, is_new=is_new, since=since, timeout_s=VERSION_TIMEOUT_S), is_new


def _uploaded(session: Session, path: Path, prefix: str = "") -> "Json":
    with folders.packed(path, prefix) as file, output.upload_progress(file.name, file.stat().st_size) as on_bytes:
        return session.client.upload_artifact(file, on_bytes)


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List all models."""
    with open_session("models list") as session:
        models = session.client.models()
    if as_json:
        output.show_json({"models": models})
        return
    rows = [
        (model["model_name"], model["latest_version"], model.get("aliases"), output.local_time(model["updated_at"])) for model in models
    ]
    output.table(("model", "latest", "aliases", "updated"), rows)


@app.command()
def show(
    reference: Annotated[str, typer.Argument(metavar="NAME[@VERSION|:ALIAS]", help="A model, or one of its versions.")],
    as_json: AsJson = False,
) -> None:
    """Show a model with its versions, or one version with all that is known of it."""
    wanted = references.model_reference(reference)
    with open_session("models show") as session:
        if wanted.version is None and wanted.alias is None:
            model, versions = session.client.model(wanted.name), session.client.versions(wanted.name)
            if as_json:
                output.show_json({**model, "versions": versions})
            else:
                _show_model(model, versions)
            return
        version = session.client.version(wanted.name, wanted.version or str(wanted.alias))
    if as_json:
        output.show_json(version)
    else:
        _show_version(version)


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The model.")],
    assignment: Annotated[str, typer.Argument(metavar="ALIAS=VERSION", help="For example champion=2.")],
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version."""
    name_of_alias, version = references.alias_assignment(assignment)
    with open_session("models alias") as session:
        answer = session.client.set_alias(name, name_of_alias, version)
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"{name}:{name_of_alias} is {name}@{version} now")


@app.command()
def example(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version that needs an example.")],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A request: JSON, CSV with a header, or .npy.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the verdict.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give an example to a version that needs one; it is tried again with it."""
    from libs.cli.stages import VERSION_TIMEOUT_S, EventFeed, VersionStory, follow

    name, number = references.version_reference(reference)
    request = read_example(path)
    with open_session("models example") as session, EventFeed(session.client, name) as feed:
        since = datetime.now(UTC)
        view = session.client.set_example(name, number, request)
        if wait:
            story = VersionStory(session.client, name, number)
            with _warnings_on_failure():
                view = follow(story, feed, output.stage, story.view(), is_new=False, since=since, timeout_s=VERSION_TIMEOUT_S)
            _note_warnings(view)
    if as_json:
        output.show_json(view)
    elif wait:
        output.say(f"{name}@{number} is {view['status']}")
    else:
        output.say(f"{name}@{number} is tried with this example")


@app.command()
def archive(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version to take out of use.")],
    as_json: AsJson = False,
) -> None:
    """Take a version out of use; refused while it is deployed."""
    name, version = references.version_reference(reference)
    with open_session("models archive") as session:
        answer = session.client.archive_version(name, version)
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"{name}@{version} is archived")


@contextmanager
def _warnings_on_failure() -> Iterator[None]:
    """What was found is said also when the version came to a bad end."""
    try:
        yield
    except StageFailedError as error:
        _note_warnings(error.view)
        raise


def _note_warnings(version: "Json") -> None:
    """Every warning about a version; the one that is its reason is said elsewhere."""
    for finding in version.get("findings") or []:
        if finding["severity"] == "warn" and finding["message"] != version.get("reason"):
            output.note(f"warning: {finding['message']} ({finding['rule']})")


def _requirements(named: Path | None, given: folders.Given) -> list[str] | None:
    """The requirements that are named, else those beside the model, else none: they are inferred."""
    if named is not None:
        return requirement_lines(named)
    return without_mlflow(requirement_lines(given.requirements)) if given.requirements else None


def _example(named: Path | None, given: folders.Given) -> Any:
    if named is not None:
        return read_example(named)
    return folders.as_request(read_json(given.example)) if given.example else None


def requirement_lines(path: Path) -> list[str]:
    """The requirements in a file, without comments and empty lines."""
    return lines_of(_read(path))


def read_example(path: Path) -> Any:
    """An example as the management API takes it: JSON as it is, CSV as ``{"csv": text}``, an array as V1's ``inputs``."""
    if path.suffix == ".npy":
        import orjson

        from libs.inference.errors import InvalidInputError
        from libs.inference.tabular import read_npy
        from libs.inference.tensors import json_ready

        try:
            return {"inputs": orjson.loads(orjson.dumps(json_ready(read_npy(path.read_bytes())), option=orjson.OPT_SERIALIZE_NUMPY))}
        except (OSError, InvalidInputError) as error:
            raise CommandError(f"{path} cannot be read as an array: {error}") from error
    if path.suffix == ".csv":
        return {"csv": _read(path)}
    return read_json(path)


def read_json(path: Path) -> Any:
    """The JSON in a file."""
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} cannot be read: {error}") from error


def _show_model(model: "Json", versions: "list[Json]") -> None:
    output.fields({"model": model["model_name"], "aliases": model.get("aliases"), "created": output.local_time(model["created_at"])})
    output.say()
    rows = [
        (
            version["version"],
            version["status"],
            version.get("format"),
            version.get("aliases"),
            output.local_time(version["created_at"]),
            version.get("reason"),
        )
        for version in versions
    ]
    output.table(("version", "status", "format", "aliases", "created", "reason"), rows)


def _show_version(version: "Json") -> None:
    artifact = version["spec"]["artifact"]
    signature = version.get("signature") or {}
    output.fields(
        {
            "version": f"{version['model_name']}@{version['version']}",
            "status": version["status"],
            "reason": version.get("reason"),
            "aliases": version.get("aliases"),
            "format": version.get("format"),
            "artifact": _artifact(artifact),
            "files": _file_set(version.get("files")),
            "code": _artifact(version["spec"].get("code")),
            "description": version["spec"].get("description"),
            "labels": version["spec"].get("labels"),
            "requirements": version.get("requirements"),
            "environment": (version.get("environment") or {}).get("environment_id"),
            "inputs": [_tensor(tensor) for tensor in signature.get("inputs", [])],
            "outputs": [_tensor(tensor) for tensor in signature.get("outputs", [])],
            "measured": _measured(version.get("measurements") or {}),
            "created": output.local_time(version["created_at"]),
        }
    )
    for finding in version.get("findings") or []:
        output.say(f"{finding['severity']}: {finding['message']} ({finding['rule']})")


def _artifact(artifact: "Json | None") -> str | None:
    return None if artifact is None else f"{artifact['filename']}, {output.size(artifact['size_bytes'])}, sha256 {artifact['sha256']}"


def _file_set(files: "Json | None") -> str | None:
    return None if files is None else f"{files['files']} files, {output.size(files['size_bytes'])}, the model is {files['model']}"


def _tensor(tensor: "Json") -> str:
    return f"{tensor['name']} {tensor['datatype']}{tensor['shape']}"


def _measured(measurements: "Json") -> list[str]:
    names = {"load_s": "load", "predict_p50_s": "predict p50", "predict_p99_s": "p99"}
    times = [f"{said} {output.duration(measurements[name])}" for name, said in names.items() if measurements.get(name) is not None]
    peak = measurements.get("peak_memory_bytes")
    return times + ([f"peak memory {output.size(peak)}"] if peak else [])
