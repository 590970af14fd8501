"""What goes wrong in the builder.

ImpossibleEnvironmentError (libs.environments)
└── BuildFailed    the requirements of a version cannot be met; ends the version's life
"""

from libs.environments import ImpossibleEnvironmentError


class BuildFailed(ImpossibleEnvironmentError):  # noqa: N818 (named as the fact it becomes)
    """The requirements cannot be met; the message says why in a sentence or two, ``evidence`` is the resolver's full text."""
