"""Does a server keep the published inference protocols? ``python -m tests.conformance --help``.

Each check is a sentence from a specification that is tried out on a running server. The server may be any: requests are built from what
it says of its model.
"""
