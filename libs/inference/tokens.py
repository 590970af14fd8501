"""Tokens that a runner asks of its clients."""

import hashlib
import hmac


def runner_token(key: bytes, runner_id: str) -> str:
    """Return the token of one runner: HMAC-SHA256 of its id under the platform's key, in hex.

    A runner knows its own token only, so no model can talk to another one's runner.
    """
    return hmac.new(key, runner_id.encode(), hashlib.sha256).hexdigest()
