"""What every payload is: a frozen pydantic model that ignores unknown fields, bound to one CloudEvents type."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?$"
ALIAS_PATTERN = r"^[a-z](?:[A-Za-z0-9-]{0,126}[a-z0-9])?$"

Name = Annotated[
    str, Field(pattern=NAME_PATTERN, description="1 to 63 letters, digits, '-' or '_'; starts and ends with a letter or digit.")
]
Alias = Annotated[
    str,
    Field(
        pattern=ALIAS_PATTERN,
        description="1 to 128 letters, digits or '-'; starts with a lower-case letter, so it is never mistaken for a version number, and "
        "ends with a lower-case letter or digit.",
    ),
]
VersionNumber = Annotated[int, Field(ge=1, description="1, 2, 3 … within a model.")]
Percent = Annotated[int, Field(ge=0, le=100, description="Percent of an endpoint's traffic.")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the content, lower-case hex.")]


class Contract(BaseModel):
    """A frozen value that crosses the log.

    Readers ignore unknown fields, so within a major version a writer may add optional ones.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Payload(Contract):
    """The data of one CloudEvent; each subclass is bound to exactly one ``event_type``.

    Attributes
    ----------
    event_type
        CloudEvents ``type``: ``millrace.<domain>.<subject>.<action>.v<major>``.
    topic
        Name of the topic the event is published to (see ``schemas.topics``).
    content_type
        Of the record's value; what is not JSON begins with the payload as JSON.
    """

    event_type: ClassVar[str]
    topic: ClassVar[str]
    content_type: ClassVar[str] = "application/json"

    @property
    def entity(self) -> str:
        """Record key: the id of the entity whose events must stay in order."""
        raise NotImplementedError


class Command(Payload):
    """What someone asks for; an imperative."""

    topic = "millrace.commands"


class Fact(Payload):
    """What happened; past tense."""

    topic = "millrace.events"
