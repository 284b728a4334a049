"""The page at `GET /`: one static file with its script and style inside, and headers that let it do little.

The one rule: nothing runs in it but what this file says. The policy names the script and the style by their
hashes, and no other host; there is no data in it, so it is open to whoever may reach this server.
"""

import base64
import hashlib
import re
from importlib.resources import files

from aiohttp import web

_BODY = files("llorch").joinpath("page.html").read_bytes()


def _hashes(tag: str) -> str:
    """The sources of every inline `tag`, as the policy writes them."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), _BODY, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


_POLICY = {
    "default-src": "'none'",
    "script-src": _hashes("script"),
    "style-src": _hashes("style"),
    "img-src": "data:",  # its icon
    "connect-src": "'self'",
    "frame-ancestors": "'none'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


async def get_page(request: web.Request) -> web.Response:
    """The page, from memory."""
    return web.Response(body=_BODY, headers=_HEADERS, content_type="text/html", charset="utf-8")
