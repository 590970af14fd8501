"""Bodies of the management API. A field that is not known is refused: a typing error must not pass in silence."""

from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from libs.errors import InvalidArgumentError
from libs.inference import declarations, examples
from libs.inference.bodies import parse_object
from schemas.base import Alias, Name, Percent, Sha256, VersionNumber
from schemas.inference import DeclaredSignature
from schemas.predictions import PredictionLogMode
from schemas.registry import ArtifactFormat, Labels

MOST_NESTED = 64
"""Deeper bodies are refused: what reads the log follows some 200 levels."""


def portable(body: bytes) -> bytes:
    """A JSON body written so that whoever reads the log later, in any language, reads what was meant.

    What is in a command stays in the state: an integer beyond 64 bits, or half a character, would be found when it is shown.

    Raises
    ------
    InvalidArgumentError
        Not a JSON object, a name given twice, NaN or Infinity, or nested too deeply.
    """
    document = parse_object(body)
    if _is_deeper(document, MOST_NESTED):
        raise InvalidArgumentError(f"the request body is nested deeper than {MOST_NESTED} levels")
    return orjson.dumps(document)


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))


class Body(BaseModel):
    """A request body."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UploadedArtifact(Body):
    """What the upload of an artifact was answered with: a model's file, or an archive (tar, tar.gz, zip) of a set of files."""

    sha256: Sha256
    size_bytes: int | None = Field(default=None, ge=0, description="Checked against what is stored, if given.")
    filename: str = Field(default="artifact", min_length=1, max_length=255)


class NewLineage(Body):
    """Where the version comes from; every field is optional."""

    parent_version: VersionNumber | None = None
    cause_event_id: str | None = Field(default=None, max_length=256)
    code: str | None = Field(default=None, max_length=1024)
    parameters: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)


def _request(example: dict[str, Any]) -> dict[str, Any]:
    if sum(form in example for form in examples.FORMS) != 1:
        raise ValueError(f"an example is a request body: it has exactly one of {', '.join(map(repr, examples.FORMS))}")
    return example


Example = Annotated[dict[str, Any], AfterValidator(_request)]


class NewExample(Body):
    """An example for a version that needs one."""

    example: Example = Field(description='A request body in any JSON form that the protocols take, or `{"csv": text}`.')


class NewVersion(Body):
    """A version to register."""

    artifact: UploadedArtifact
    code: UploadedArtifact | None = Field(
        default=None,
        description="Python modules that the model may import: an archive (what is at its top can be imported), or one `.py` file, "
        "whose filename is the module's.",
    )
    format: ArtifactFormat | None = Field(default=None, description="sklearn or onnx; absent: decided by content.")
    requirements: tuple[str, ...] | None = Field(default=None, max_length=200, description="PEP 508 lines; absent: inferred.")
    example: Example | None = Field(
        default=None,
        description='A request body in any JSON form that the protocols take, or `{"csv": text}`; the version must be able to answer it.',
    )
    signature: DeclaredSignature | None = Field(default=None, description="Typed inputs or columns; absent: found in the trial.")
    forbid_batching: bool = Field(default=False, description="Never join or cut requests, whatever the trial finds.")
    allow_code: bool = Field(default=False, description="Consent to code that the artifact carries, or calls when it is loaded.")
    aliases: tuple[Alias, ...] = ()
    description: str = Field(default="", max_length=4096)
    labels: Labels = Field(default_factory=dict)
    lineage: NewLineage = Field(default_factory=NewLineage)

    @field_validator("signature", mode="before")
    @classmethod
    def _is_signature(cls, document: Any) -> Any:
        try:
            return None if document is None else declarations.read(document)
        except InvalidArgumentError as error:
            raise ValueError(error.message) from error


class AliasTarget(Body):
    """The version an alias shall point at."""

    version: VersionNumber


class NewPredictionLog(Body):
    """How an endpoint's requests shall be logged; what is absent is the default."""

    mode: PredictionLogMode = PredictionLogMode.BEST_EFFORT
    sample_percent: float = Field(default=100.0, ge=0, le=100, description="Percent of the requests whose inputs and outputs are kept.")
    max_rows_per_s: int = Field(default=10_000, ge=0, le=2**31 - 1, description="Most rows of inputs and outputs kept per second.")


class NewEndpoint(Body):
    """An endpoint to create."""

    name: Name
    description: str = Field(default="", max_length=4096)
    labels: Labels = Field(default_factory=dict)
    prediction_log: NewPredictionLog | None = None


class NewDeployment(Body):
    """A version to deploy: by number, by alias, or the newest validated one."""

    model: Name
    version: VersionNumber | None = None
    alias: Alias | None = None
    traffic_percent: Percent = 100
    min_replicas: int = Field(default=1, ge=1, le=64)
    max_replicas: int | None = Field(default=None, ge=1, le=64, description="Absent: as many as min_replicas.")


class NewTraffic(Body):
    """An endpoint's whole split, by deployment id or version number, in percent; it sums to 100."""

    traffic: dict[str, Percent] = Field(min_length=1, max_length=100)
