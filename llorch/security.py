"""Who may ask: Host and Origin against browsers' tricks, the bearer token, the identity for the log.

The one rule: every check works on headers as they came, before anything is stored; secrets are compared in
constant time on bytes.
"""

import functools
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import NoReturn

from multidict import CIMultiDictProxy

from llorch.errors import BadToken, ForbiddenHost, ForbiddenOrigin, InvalidParams, LlorchError, MissingToken

Headers = CIMultiDictProxy[str]

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
_FORWARDING = frozenset({"forwarded", "x-real-ip", "via"})
_FORWARDING_PREFIXES = ("x-forwarded-", "cf-", "tailscale-")
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Gate:
    """What stands before every route. `token` empty: no token is asked for."""

    def __init__(
        self,
        *,
        token: str,
        optional_on_loopback: bool,
        trust_proxy_auth: bool,
        own_names: Iterable[str],
        cors_origins: Iterable[str],
    ) -> None:
        self._token = token
        self._token_identity = f"token:{hashlib.sha256(token.encode()).hexdigest()[:6]}"
        self._optional_on_loopback = optional_on_loopback
        self._trust_proxy_auth = trust_proxy_auth
        self._own_names = {"localhost", *(name.lower() for name in own_names if name)}
        self._cors_origins = {origin.lower() for origin in cors_origins}

    @property
    def token_needed(self) -> bool:
        """Whether a token is configured."""
        return bool(self._token)

    # -- where the request comes from ------------------------------------------------------------

    def check_site(
        self, headers: Headers, target_host: str | None = None, *, navigable: bool = False
    ) -> None:
        """Refuse DNS rebinding and pages of other sites; `target_host` is that of an absolute request target.

        `navigable`: a link on another site may lead here, which is all that such a site can do with it.
        Raises ForbiddenHost, ForbiddenOrigin, or InvalidParams for two Host headers.
        """
        hosts = headers.getall("Host", [])
        if len(hosts) > 1:
            raise InvalidParams("two Host headers")
        host = hosts[0] if hosts else ""
        match = _HOST.fullmatch(host)
        if match is None or not self._is_own(match["name"]):
            self._forbid_host(host)
        if target_host is not None and not self._is_own(target_host):
            self._forbid_host(target_host)
        self._check_origin(headers, host, navigable=navigable)

    def _is_own(self, name: str) -> bool:
        """Whether `name` is this machine: by name, or as an IP literal in canonical form."""
        return _is_ip_literal(name) or name.lower() in self._own_names

    def _forbid_host(self, host: str) -> NoReturn:
        raise ForbiddenHost(
            f"the Host {host[:80]!r} is not this server",
            hint="use localhost or an IP address, or add the name to http.allowed_hosts",
        )

    def _check_origin(self, headers: Headers, host: str, *, navigable: bool) -> None:
        if self.allows_cors(headers):
            return
        for origin in headers.getall("Origin", []):
            scheme, _, authority = origin.partition("://")
            if scheme not in ("http", "https") or authority.lower() != host.lower():
                raise ForbiddenOrigin(
                    f"pages of {origin[:80]!r} may not ask", hint="add the origin to http.cors_origins"
                )
        if navigable and headers.get("Sec-Fetch-Mode") == "navigate":
            return
        if headers.get("Sec-Fetch-Site", "").lower() == "cross-site":
            raise ForbiddenOrigin("a page of another site may not ask")

    # -- CORS --------------------------------------------------------------------------------------

    def allows_cors(self, headers: Headers) -> bool:
        """Whether the request comes from a page of a configured origin."""
        origins = headers.getall("Origin", [])
        return len(origins) == 1 and origins[0].lower() in self._cors_origins

    def cors_headers(self, headers: Headers) -> dict[str, str]:
        """What lets a page of a configured origin read the answer; never with credentials."""
        if not self._cors_origins:
            return {}
        if not self.allows_cors(headers):
            return {"Vary": "Origin"}
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": headers["Origin"],
            "Access-Control-Expose-Headers": "Location, Retry-After, X-Backoff-Ms, X-Correlation-Id",
        }

    # -- who asks ----------------------------------------------------------------------------------

    def identify(self, peer: str | None, headers: Headers) -> str:
        """`localhost`, `proxy` or `token:<6 hex>`; raises MissingToken, BadToken, or InvalidParams."""
        given = headers.getall("Authorization", [])
        if len(given) > 1:
            raise InvalidParams("two Authorization headers")
        if not self._token:
            return "localhost"
        local, proxied = _is_loopback(peer), _is_proxied(headers)
        if given and self._matches(given[0]):
            return self._token_identity
        if self._trust_proxy_auth and local and proxied and given and given[0].strip():
            return "proxy"
        if not given and self._optional_on_loopback and local and not proxied:
            return "localhost"
        refusal: type[LlorchError] = BadToken if given else MissingToken
        bearer = any(header.strip().lower().startswith("bearer ") for header in given)
        what = "a different token is expected" if bearer else "a Bearer token is needed"
        raise refusal(what, hint="send Authorization: Bearer <the configured auth.token>", headers=_CHALLENGE)

    def _matches(self, authorization: str) -> bool:
        scheme, _, token = authorization.strip().partition(" ")
        return scheme.lower() == "bearer" and same_secret(token.strip(), self._token)


def check_ticket(given: str, ticket: str | None) -> None:
    """Raise BadToken unless `given` is the ticket of the task whose stream is asked for."""
    if ticket is None or not same_secret(given, ticket):
        raise BadToken("this ticket opens no such stream", headers=_CHALLENGE)


def same_secret(given: str, expected: str) -> bool:
    """Compare in constant time, on bytes: on text it would raise for what is not ASCII."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def _is_loopback(peer: str | None) -> bool:
    try:
        address = ipaddress.ip_address((peer or "").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_proxied(headers: Headers) -> bool:
    """Whether a reverse proxy passed this on: then its peer is the proxy, not the client."""
    names = (name.lower() for name in headers)
    return any(name in _FORWARDING or name.startswith(_FORWARDING_PREFIXES) for name in names)


@functools.lru_cache(maxsize=128)
def _is_ip_literal(name: str) -> bool:
    """Whether `name` is an IPv6 address, in brackets or not, or an IPv4 address in canonical form."""
    try:
        if name.startswith("[") or ":" in name:
            ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]"))
            return True
        return str(ipaddress.IPv4Address(name)) == name
    except ValueError:
        return False
