"""What can go wrong with the platform on one machine.

MillraceError
├── ConflictError
│   ├── AlreadyRunningError    a second `up` on the same home
│   └── PortTakenError         somebody else listens where we must
├── ConfigurationError
│   ├── HomeUnusableError      the home cannot be written, or its disk is full
│   └── KafkaUnavailableError  no JVM, or no way to its jars
└── PartFailedError            a part of the platform does not come up
"""

from collections.abc import Sequence

from libs.errors import ConfigurationError, ConflictError, MillraceError


class AlreadyRunningError(ConflictError):
    """The platform of this home runs already."""


class PortTakenError(ConflictError):
    """Another process listens on a port that a part needs."""


class HomeUnusableError(ConfigurationError):
    """The home cannot be written, or its disk has no room."""


class KafkaUnavailableError(ConfigurationError):
    """Apache Kafka cannot be had on this machine."""


class PartFailedError(MillraceError):
    """A part did not become ready.

    Parameters
    ----------
    message
        One sentence: which part, why, and where its log is.
    log_lines
        The end of that part's log, oldest first.
    """

    def __init__(self, message: str, log_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log_lines = tuple(log_lines)
