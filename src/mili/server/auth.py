"""API keys: `Authorization: Bearer KEY` or `x-api-key: KEY`, checked before anything else of a request is read.

Knows no users and no rights: any of the keys opens everything. Invariant: a key is neither stored nor logged, only its
digest is kept, and comparing takes the same time whichever key is sent.
"""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from mili.server.errors import ApiError
from mili.server.limits import refuse
from mili.server.middleware import header


class ApiKeyAuth:
    """Answers 401 unless the request has one of the keys or asks for an open path."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str]) -> None:
        self._app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        message = "no valid API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
        headers = {"WWW-Authenticate": "Bearer"}
        error = ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=headers)
        await refuse(scope, receive, send, error)

    def _has_key(self, scope: Scope) -> bool:
        sent = header(scope, b"x-api-key") or ""
        scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            sent = token.strip()
        digest = sha256(sent.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return any(matches)
