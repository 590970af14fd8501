"""What a version's environment is made from, and why it cannot be made."""

import hashlib
import json
import re
from dataclasses import dataclass

from libs.requirements import Requirement, parse_requirements, with_requirement

RESOLUTION_FORMAT = 1
"""Part of every resolution's key; raised when the same requirements shall be resolved in another way than before."""

_LONGEST_REASON = 400
_SENTENCE = re.compile(r"(?:And )?[Bb]ecause (.+?), we can conclude that (.+?)\.(?=\s|$)", re.DOTALL)
_NO_WHEELS = "Wheels are required for"
_OTHER_PYTHONS = re.compile(r"You require (.+?), but we only found wheels for (.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class EnvironmentRequest:
    """What to resolve: packages for one Python on one platform. Equal requests have equal keys."""

    requirements: tuple[Requirement, ...]
    python: str
    platform: str

    @property
    def key(self) -> str:
        """Digest of the request, 64 hexadecimal digits."""
        content = [RESOLUTION_FORMAT, [str(r) for r in self.requirements], self.python, self.platform]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def text(self) -> str:
        """The requirements as a file."""
        return "".join(f"{requirement}\n" for requirement in self.requirements)


def environment_request(requirements: tuple[str, ...], *, python: str, platform: str) -> EnvironmentRequest:
    """The request for a version: its own requirements, and NumPy, which the runner speaks.

    Raises
    ------
    InvalidRequirementsError
        A requirement is more than a name and versions.
    """
    return EnvironmentRequest(with_requirement(parse_requirements(requirements), "numpy"), python, platform)


def explain(stderr: str) -> str:
    '''Why uv found no solution, in one or two sentences for the one who wrote the requirements.

    uv argues in steps ("Because A and B, we can conclude that C. And because C and D, …"): the premises are what a user can act on, the
    conclusions follow from them.

    Examples
    --------
    >>> explain("""error: No solution found when resolving dependencies
    ...   cause: Because there is no version of a==9 and you require a==9, we can conclude that your requirements are unsatisfiable.""")
    'The requirements cannot be met: there is no version of a==9 and you require a==9.'
    '''
    argument, *hints = (" ".join(part.split()) for part in stderr.split("\n\n"))
    argument = argument.partition("cause: ")[2] or argument.removeprefix("error: ")
    premises = [match[1] for match in _SENTENCE.finditer(argument)]
    reason = _shortened("; ".join(premises) or argument.rstrip("."))
    return " ".join([f"The requirements cannot be met: {reason}.", *_advice(hints)])


def _advice(hints: list[str]) -> list[str]:
    """At most one of uv's hints, in our words."""
    for hint in hints:
        if _NO_WHEELS in hint:
            return ["Only packages with ready-made wheels are installed, because nothing may run while an environment is built."]
        if found := _OTHER_PYTHONS.search(hint):
            wheels = found[2].rstrip(".").replace("`", "")
            return [f"The platform runs {found[1].replace('`', '')}, and there are only wheels for {_shortened(wheels)}."]
    return []


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"
