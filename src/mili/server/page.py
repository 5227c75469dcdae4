"""The web page at `/`: one file, and headers that let a browser run nothing but what is in it.

Knows nothing of the API. Invariant: the policy names the script and the style by their hashes, so it holds for exactly
the text that goes out with it.
"""

import re
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_FILE = Path(__file__).with_name("static") / "index.html"
_INLINE = re.compile(r"<(?P<tag>script|style)>(?P<text>.*?)</(?P=tag)>", re.S)


@dataclass(frozen=True, slots=True)
class Page:
    """What `GET /` answers."""

    body: str
    headers: dict[str, str]  # besides Content-Type, which is text/html; charset=utf-8


def make_router() -> APIRouter:
    """`/`."""
    router = APIRouter()
    page = load_page()

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page.body, headers=page.headers)

    return router


def load_page() -> Page:
    """Read the page and make its headers."""
    body = _FILE.read_text(encoding="utf-8")
    hashes = {m["tag"]: b64encode(sha256(m["text"].encode()).digest()).decode() for m in _INLINE.finditer(body)}
    policy = [
        "default-src 'none'",
        f"script-src 'sha256-{hashes['script']}'",
        f"style-src 'sha256-{hashes['style']}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # assigning markup (innerHTML and its kin) throws
        "trusted-types 'none'",
    ]
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # another version of mili may serve the next one
    }
    return Page(body, headers)
