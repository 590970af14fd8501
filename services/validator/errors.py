"""What goes wrong while an artifact is read. None of these leaves the validator: each becomes a finding.

MillraceError
├── BrokenArtifactError       the content ends too early or is not what it begins as
├── BrokenPickleError         not a sequence of pickle opcodes, or one that ends too early
├── OversizedContentError     expands beyond the limit
├── ForbiddenEntryError       an archive with something in it that no set of files may have
└── LongPickleError           more opcodes than are looked at
"""

from libs.errors import MillraceError


class BrokenArtifactError(MillraceError):
    """The content ends too early or is not what it begins as."""


class BrokenPickleError(MillraceError):
    """Not a sequence of pickle opcodes, or one that ends too early."""


class OversizedContentError(MillraceError):
    """Compressed content that expands beyond the limit."""


class LongPickleError(MillraceError):
    """More opcodes than are looked at."""


class ForbiddenEntryError(MillraceError):
    """An archive with something in it that no set of files may have."""
