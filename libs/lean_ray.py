"""Ray Serve, imported without pandas.

Where pandas is installed Serve imports it, to be able to encode data frames as JSON, which it is never asked for here. That is 2.6 of the
6.2 seconds of CPU of its import, in each of three processes that start one after the other: serving, Serve's controller and a replica.
Whoever needs pandas imports it as ever afterwards.
"""

import sys

_NAME = "pandas"

_is_hidden = _NAME not in sys.modules
if _is_hidden:
    sys.modules[_NAME] = None  # type: ignore[assignment]  # Python's own way of saying that there is none
try:
    import ray.serve._private.utils  # noqa: F401 - the only module of it that does
finally:
    if _is_hidden:
        del sys.modules[_NAME]
