"""Who may ask: Host and Origin, tokens, proxies, tickets, and the identity that the log is given."""

import hashlib
import hmac
import re
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from llorch import security
from llorch.config import load
from llorch.errors import BadToken, ForbiddenHost, ForbiddenOrigin, InvalidParams, LlorchError, MissingToken
from llorch.schema import ConfigError
from llorch.security import Gate, check_ticket, same_secret

TOKEN = "canary-token-0123456789"
IDENTITY = f"token:{hashlib.sha256(TOKEN.encode()).hexdigest()[:6]}"
HOST = "127.0.0.1:8080"
OWN_NAMES = ("Workstation", "llm.example.com", "")


def gate(**options: Any) -> Gate:
    """A gate without a token on a machine called workstation, which is llm.example.com to others."""
    given: dict[str, Any] = {
        "token": "",
        "optional_on_loopback": False,
        "trust_proxy_auth": False,
        "own_names": OWN_NAMES,
        "cors_origins": (),
    }
    return Gate(**given | options)


def headers(*pairs: tuple[str, str], **named: str) -> CIMultiDictProxy[str]:
    """Headers as they came; an underscore in a name stands for a hyphen."""
    return CIMultiDictProxy(CIMultiDict([*pairs, *((k.replace("_", "-"), v) for k, v in named.items())]))


def site(*, options: dict[str, Any] | None = None, target: str | None = None, **named: str) -> str:
    """The code of what `check_site` says of a request with these headers, "ok" if it lets it pass."""
    try:
        gate(**options or {}).check_site(headers(**{"Host": HOST} | named), target)
    except LlorchError as error:
        return error.code
    return "ok"


# -- the Host --------------------------------------------------------------------------------------

OWN_HOSTS = [
    "localhost",
    "LocalHost",
    "localhost:8080",
    "localhost:1",
    "localhost:65535",
    "127.0.0.1",
    "127.0.0.1:8080",
    "127.8.9.10",
    "10.0.0.7:80",
    "0.0.0.0:8080",
    "255.255.255.255",
    "[::1]",
    "[::1]:8080",
    "[::]:8080",
    "[2001:DB8::1]:8080",
    "[fe80::1]",
    "[::ffff:127.0.0.1]:8080",
    "[0:0:0:0:0:0:0:1]",
    "workstation",
    "WORKSTATION:22",
    "llm.example.com",
    "LLM.Example.COM:443",
]
FOREIGN_HOSTS = [
    "",
    " ",
    ":8080",
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "localhost.localdomain",
    "evil-localhost",
    "127.0.0.1.nip.io",
    "127.0.0.1.evil.example:8080",
    "workstation.evil.example",
    "sub.llm.example.com",
    "example.com",
    # trailing dots: the same name to DNS, another one to a browser's same-origin rule
    "localhost.",
    "localhost.:8080",
    "127.0.0.1.",
    "llm.example.com.",
    "[::1].",
    # IPv4 as no browser writes it, but as a resolver may read it
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "127.1",
    "127.0.0.01",
    "127.0.0.256",
    "127.0.0.1.1",
    "127.0.0",
    "0",
    "١٢٧.0.0.1",
    # user names
    "user@localhost",
    "localhost@evil.example",
    "user:pass@127.0.0.1:8080",
    # IPv6
    "::1",
    "::1:8080",
    "[::1",
    "::1]",
    "[]",
    "[::1]8080",
    "[::1%lo]:8080",
    "[::1%25lo]",
    "[127.0.0.1]",
    "[localhost]",
    "[::g]",
    "[1::2::3]",
    "[12345::]",
    # ports
    "localhost:",
    "localhost:x",
    "localhost:-1",
    "localhost:+80",
    "localhost:123456",
    "localhost:80:80",
    "localhost:٨٠",
    "localhost: 80",
    # more than a host
    "localhost/",
    "localhost:8080/path",
    "http://localhost",
    "localhost?x",
    "localhost#x",
    "localhost\\@evil.example",
    "localhost,evil.example",
    "localhost evil.example",
    " localhost",
    "localhost ",
    "localhost\n",
    "localhost\t",
    "localhost\0",
    "*",
    "*.example.com",
    "lo\u017fthost",  # a long s, which is an s when case is ignored
    "wor\u212astation",  # a kelvin sign, which is a k
    "l\u043ecalhost",  # a cyrillic o
    "\udcff",  # a byte that is no text
]


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_a_host_that_is_this_machine(host: str) -> None:
    """localhost, IP literals, the machine's own name and those of the configuration, at any port [T1]."""
    assert site(Host=host) == "ok"


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_host_that_is_not_this_machine(host: str) -> None:
    """What DNS could be made to point here is refused, and so is what is no host at all [T1]."""
    assert site(Host=host) == "FORBIDDEN_HOST"


def test_a_request_without_a_host_is_refused() -> None:
    """HTTP/1.0 is no way around the check [T1]."""
    with pytest.raises(ForbiddenHost):
        gate().check_site(headers())


def test_two_hosts_are_refused() -> None:
    """Even two good ones: which would a proxy have believed? [T1, T9]"""
    with pytest.raises(InvalidParams, match="two Host headers"):
        gate().check_site(headers(("Host", "localhost"), ("host", "localhost")))


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        (None, "ok"),
        ("localhost", "ok"),
        ("127.0.0.1", "ok"),
        ("::1", "ok"),
        ("Workstation", "ok"),
        ("evil.example", "FORBIDDEN_HOST"),
        ("localhost.", "FORBIDDEN_HOST"),
        ("127.1", "FORBIDDEN_HOST"),
        ("::1%lo", "ok"),
        ("", "FORBIDDEN_HOST"),
    ],
)
def test_the_host_of_an_absolute_target_counts_too(target: str | None, answer: str) -> None:
    """`GET http://evil.example/ HTTP/1.1` with a good Host is refused, and so is the reverse [T1]."""
    assert site(target=target) == answer
    assert site(Host="evil.example", target=target) == "FORBIDDEN_HOST"


def test_a_refused_host_is_quoted_shortly() -> None:
    """The message says what came, escaped, and how to allow it."""
    with pytest.raises(ForbiddenHost) as error:
        gate().check_site(headers(Host="\udcff\n" + "x" * 100_000))
    assert len(error.value.message.encode()) < 200
    assert r"\udcff\nxxx" in error.value.message
    assert "http.allowed_hosts" in (error.value.hint or "")


# -- pages of other sites --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "answer"),
    [
        (HOST, "http://127.0.0.1:8080", "ok"),
        (HOST, "https://127.0.0.1:8080", "ok"),  # behind a proxy that ends TLS
        ("localhost:8080", "http://LOCALHOST:8080", "ok"),
        ("[::1]:8080", "http://[::1]:8080", "ok"),
        ("llm.example.com", "https://llm.example.com", "ok"),
        (HOST, "http://127.0.0.1:3000", "FORBIDDEN_ORIGIN"),  # another program on this machine
        (HOST, "http://127.0.0.1", "FORBIDDEN_ORIGIN"),
        (HOST, "http://localhost:8080", "FORBIDDEN_ORIGIN"),
        (HOST, "http://evil.example", "FORBIDDEN_ORIGIN"),
        (HOST, "http://127.0.0.1:8080.evil.example", "FORBIDDEN_ORIGIN"),
        (HOST, "http://evil@127.0.0.1:8080", "FORBIDDEN_ORIGIN"),
        (HOST, "http://127.0.0.1:8080/", "FORBIDDEN_ORIGIN"),
        (HOST, "null", "FORBIDDEN_ORIGIN"),
        (HOST, "", "FORBIDDEN_ORIGIN"),
        (HOST, HOST, "FORBIDDEN_ORIGIN"),
        (HOST, f"file://{HOST}", "FORBIDDEN_ORIGIN"),
        (HOST, f"chrome-extension://{HOST}", "FORBIDDEN_ORIGIN"),
        (HOST, f"http://{HOST} http://{HOST}", "FORBIDDEN_ORIGIN"),
    ],
)
def test_a_page_may_ask_only_where_it_came_from(host: str, origin: str, answer: str) -> None:
    """Origin has this Host's very host and port, or the request is refused [T2]."""
    assert site(Host=host, Origin=origin) == answer


@pytest.mark.parametrize(
    ("fetch_site", "answer"),
    [
        ("same-origin", "ok"),
        ("none", "ok"),
        ("same-site", "ok"),
        ("cross-site", "FORBIDDEN_ORIGIN"),
        ("Cross-Site", "FORBIDDEN_ORIGIN"),
    ],
)
def test_what_a_browser_says_of_the_page_counts(fetch_site: str, answer: str) -> None:
    """A GET without an Origin is told by Sec-Fetch-Site: an image, a script, a bodyless form [T2]."""
    assert site(Sec_Fetch_Site=fetch_site) == answer


def test_of_two_origins_both_must_be_ours() -> None:
    """No browser sends two [T2]."""
    own, other = ("Origin", f"http://{HOST}"), ("Origin", "http://evil.example")
    gate().check_site(headers(own, own, Host=HOST))
    for pair in ((own, other), (other, own)):
        with pytest.raises(ForbiddenOrigin):
            gate().check_site(headers(*pair, Host=HOST))
        with pytest.raises(ForbiddenOrigin):
            gate(cors_origins=["http://evil.example"]).check_site(headers(*pair, Host=HOST))


# -- CORS ------------------------------------------------------------------------------------------

PAGE = "https://page.example"
CORS = {"cors_origins": [PAGE, "http://Other.Example:81"]}


@pytest.mark.parametrize(
    ("origin", "answer"),
    [
        (PAGE, "ok"),
        ("HTTPS://PAGE.EXAMPLE", "ok"),
        ("http://other.example:81", "ok"),
        ("http://page.example", "FORBIDDEN_ORIGIN"),
        ("https://page.example:444", "FORBIDDEN_ORIGIN"),
        ("https://page.example.evil.example", "FORBIDDEN_ORIGIN"),
        ("https://sub.page.example", "FORBIDDEN_ORIGIN"),
        ("null", "FORBIDDEN_ORIGIN"),
    ],
)
def test_a_configured_origin_may_ask_from_another_site(origin: str, answer: str) -> None:
    """And nobody else; the Host is checked all the same [T2, T3]."""
    assert site(options=CORS, Origin=origin, Sec_Fetch_Site="cross-site") == answer
    assert site(options=CORS, Origin=origin, Host="evil.example") == "FORBIDDEN_HOST"


def test_no_cors_header_unless_configured() -> None:
    """By default no page of another origin can read an answer [T3]."""
    assert gate().cors_headers(headers(Origin=f"http://{HOST}")) == {}
    assert not gate().allows_cors(headers(Origin=""))


def test_a_configured_origin_is_echoed_exactly() -> None:
    """Never a star, never credentials, and caches are told that it depends on the Origin [T3]."""
    sent = gate(**CORS).cors_headers(headers(Origin=PAGE))
    assert sent.pop("Access-Control-Expose-Headers")
    assert sent == {"Vary": "Origin", "Access-Control-Allow-Origin": PAGE}


@pytest.mark.parametrize("origin", [[], ["null"], ["https://evil.example"], [PAGE, PAGE]])
def test_any_other_origin_gets_no_leave_to_read(origin: list[str]) -> None:
    """But the Vary that keeps a cache from mixing the two up [T3]."""
    sent = gate(**CORS).cors_headers(headers(*(("Origin", text) for text in origin)))
    assert sent == {"Vary": "Origin"}


# -- tokens ----------------------------------------------------------------------------------------


def who(peer: str | None = "127.0.0.1", *pairs: tuple[str, str], **options: Any) -> str:
    """The identity of a request to a gate with a token, or the code of its refusal."""
    try:
        return gate(**{"token": TOKEN} | options).identify(peer, headers(*pairs))
    except LlorchError as refusal:
        challenge = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
        return refusal.code if refusal.headers == challenge else "NO CHALLENGE"


def bearer(token: str = TOKEN) -> tuple[str, str]:
    """The header that carries it."""
    return "Authorization", f"Bearer {token}"


@pytest.mark.parametrize(
    ("authorization", "answer"),
    [
        (f"Bearer {TOKEN}", IDENTITY),
        (f"bearer {TOKEN}", IDENTITY),
        (f"BEARER   {TOKEN} ", IDENTITY),
        (f"Bearer {TOKEN}x", "BAD_TOKEN"),
        (f"Bearer x{TOKEN}", "BAD_TOKEN"),
        (f"Bearer {TOKEN[:-1]}", "BAD_TOKEN"),
        (f"Bearer {TOKEN.upper()}", "BAD_TOKEN"),
        (f"Bearer {TOKEN} {TOKEN}", "BAD_TOKEN"),
        (f"Bearer {TOKEN}, Bearer {TOKEN}", "BAD_TOKEN"),
        (f'Bearer "{TOKEN}"', "BAD_TOKEN"),
        (f"Bearer\t{TOKEN}", "BAD_TOKEN"),
        (f"Bearer{TOKEN}", "BAD_TOKEN"),
        (f"Bearer={TOKEN}", "BAD_TOKEN"),
        (f"Basic {TOKEN}", "BAD_TOKEN"),
        (f"Token {TOKEN}", "BAD_TOKEN"),
        (TOKEN, "BAD_TOKEN"),
        ("Bearer", "BAD_TOKEN"),
        ("Bearer ", "BAD_TOKEN"),
        ("", "BAD_TOKEN"),
        ("Bearer \u00e9", "BAD_TOKEN"),
        ("Bearer \U0001f600", "BAD_TOKEN"),
        ("Bearer \udcff\udc80", "BAD_TOKEN"),
        (f"Bearer {TOKEN[:-1]}\udcff", "BAD_TOKEN"),
        (f"Bearer {TOKEN}\0", "BAD_TOKEN"),
        ("Bearer " + "x" * 1_000_000, "BAD_TOKEN"),
    ],
)
def test_only_the_token_itself_lets_in(authorization: str, answer: str) -> None:
    """Wrong, malformed, non-ASCII and huge ones are 401 with a challenge, never an exception [T4]."""
    assert who("127.0.0.1", ("Authorization", authorization)) == answer
    assert who("192.0.2.1", ("authorization", authorization)) == answer


def test_a_missing_token_is_another_refusal_than_a_wrong_one() -> None:
    """The client learns which [T4]."""
    assert who("127.0.0.1") == who("192.0.2.1") == "MISSING_TOKEN"
    assert who("127.0.0.1", ("X-API-Key", TOKEN)) == "MISSING_TOKEN"


@pytest.mark.parametrize("token", [TOKEN, ""])
def test_two_authorization_headers_are_refused(token: str) -> None:
    """Even if both are right, and even where none is needed [T4]."""
    assert who("127.0.0.1", bearer(), bearer(), token=token) == "INVALID_PARAMS"
    assert who("127.0.0.1", bearer(), ("authorization", "x"), token=token) == "INVALID_PARAMS"


def test_a_refusal_never_says_a_token() -> None:
    """Neither the one that was expected nor the one that came [T4, T18]."""
    with pytest.raises(BadToken) as error:
        gate(token=TOKEN).identify("192.0.2.1", headers(bearer("other-canary")))
    said = f"{error.value.message} {error.value.hint} {error.value.headers}"
    assert "canary" not in said
    assert "canary" not in repr(error.value)


def test_secrets_are_compared_on_bytes_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hmac.compare_digest` raises for text that is not ASCII, and `==` tells by its time [T4]."""
    compared: list[tuple[Any, Any]] = []
    compare_digest = hmac.compare_digest

    def compare(given: Any, expected: Any) -> bool:
        compared.append((given, expected))
        return compare_digest(given, expected)

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    assert who("127.0.0.1", bearer("\udcff\u00e9")) == "BAD_TOKEN"
    assert who("127.0.0.1", bearer()) == IDENTITY
    assert compared == [(b"\xff\xc3\xa9", TOKEN.encode()), (TOKEN.encode(), TOKEN.encode())]


@given(st.text(), st.text())
@settings(deadline=None)
def test_a_secret_is_the_same_only_as_itself(one: str, other: str) -> None:
    """For all text [T4]."""
    assert same_secret(one, one)
    assert same_secret(one, other) is (one == other)


def test_without_a_token_nobody_is_asked() -> None:
    """Open on loopback, as the bind allows; an Authorization header is not looked at."""
    assert not gate().token_needed
    assert gate(token=TOKEN).token_needed
    assert who("127.0.0.1", token="") == "localhost"
    assert who("127.0.0.1", bearer("wrong"), token="") == "localhost"


# -- the loopback exemption and proxies ------------------------------------------------------------

LOOPBACK = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "::1%lo"]
REMOTE = [
    "192.0.2.1",
    "10.0.0.1",
    "0.0.0.0",
    "2001:db8::1",
    "::ffff:192.0.2.1",
    "fe80::1%eth0",
    "",
    "x",
    None,
]
FORWARDING = [
    "Forwarded",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Forwarded-Anything",
    "X-Real-IP",
    "Via",
    "CF-Connecting-IP",
    "CF-Ray",
    "Tailscale-User-Login",
]


@pytest.mark.parametrize("peer", LOOPBACK)
def test_a_direct_loopback_peer_is_exempt_if_the_token_is_optional(peer: str) -> None:
    """By IPv4, IPv6 and IPv4 in IPv6; a token that it gives must be right all the same [T7]."""
    assert who(peer, optional_on_loopback=True) == "localhost"
    assert who(peer, bearer(), optional_on_loopback=True) == IDENTITY
    assert who(peer, bearer("wrong"), optional_on_loopback=True) == "BAD_TOKEN"
    assert who(peer, optional_on_loopback=False) == "MISSING_TOKEN"


@pytest.mark.parametrize("peer", REMOTE)
def test_any_other_peer_is_not(peer: str | None) -> None:
    """An address that can't be read included [T7]."""
    assert who(peer, optional_on_loopback=True) == "MISSING_TOKEN"
    assert who(peer, bearer(), optional_on_loopback=True) == IDENTITY


@pytest.mark.parametrize("name", FORWARDING)
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
def test_a_request_that_a_proxy_passed_on_is_not_direct(name: str, value: str) -> None:
    """Whatever the header says: with a proxy here every stranger would look local [T7]."""
    for written in (name, name.lower(), name.upper()):
        assert who("127.0.0.1", (written, value), optional_on_loopback=True) == "MISSING_TOKEN"
        assert who("127.0.0.1", (written, value), bearer(), optional_on_loopback=True) == IDENTITY


@pytest.mark.parametrize("name", ["X-Forward", "Viaduct", "CFX", "Tailscale", "X-Real-IP-Not", "Accept"])
def test_other_headers_make_no_proxy(name: str) -> None:
    """Prefixes are taken for no more than they are [T7]."""
    assert who("127.0.0.1", (name, "x"), optional_on_loopback=True) == "localhost"


@pytest.mark.parametrize("name", FORWARDING)
def test_a_trusted_proxy_speaks_for_its_clients(name: str) -> None:
    """With `trust_proxy_auth`: a loopback peer, such a header, an Authorization that is not empty [T7]."""
    via, basic = (name, "x"), ("Authorization", "Basic dTpw")
    assert who("127.0.0.1", via, basic, trust_proxy_auth=True) == "proxy"
    assert who("::ffff:127.0.0.1", via, basic, trust_proxy_auth=True) == "proxy"
    assert who("127.0.0.1", via, bearer(), trust_proxy_auth=True) == IDENTITY
    assert who("127.0.0.1", via, basic, trust_proxy_auth=False) == "BAD_TOKEN"
    assert who("127.0.0.1", via, trust_proxy_auth=True) == "MISSING_TOKEN"
    assert who("127.0.0.1", via, ("Authorization", "  "), trust_proxy_auth=True) == "BAD_TOKEN"
    assert who("127.0.0.1", basic, trust_proxy_auth=True) == "BAD_TOKEN"
    assert who("192.0.2.1", via, basic, trust_proxy_auth=True) == "BAD_TOKEN"
    assert who("127.0.0.1", via, basic, basic, trust_proxy_auth=True) == "INVALID_PARAMS"


# -- the six cases of the minimal auth -------------------------------------------------------------

MINIMAL_AUTH = {
    "loopback, token optional": ({"auth.optional": True}, "127.0.0.1", None, "localhost"),
    "loopback, token required": ({}, "127.0.0.1", None, "MISSING_TOKEN"),
    "missing token": ({"bind_addr": "0.0.0.0:8080"}, "192.0.2.1", None, "MISSING_TOKEN"),
    "wrong token": ({"bind_addr": "0.0.0.0:8080"}, "192.0.2.1", "wrong", "BAD_TOKEN"),
    "right token": ({"bind_addr": "0.0.0.0:8080"}, "192.0.2.1", TOKEN, IDENTITY),
}


@pytest.mark.parametrize(("flags", "peer", "token", "answer"), MINIMAL_AUTH.values(), ids=MINIMAL_AUTH)
def test_minimal_auth(flags: dict[str, Any], peer: str, token: str | None, answer: str) -> None:
    """From the configuration to the identity or the refusal [MVP-011, T4]."""
    auth = load(flags={"auth.token": TOKEN} | flags).auth
    given = [bearer(token)] if token else []
    assert who(peer, *given, token=auth.token, optional_on_loopback=auth.optional) == answer


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "[::]:8080", "192.168.1.5:8080"])
def test_beyond_loopback_without_a_token_there_is_no_start(address: str) -> None:
    """The sixth case: the configuration is refused [MVP-011]."""
    with pytest.raises(ConfigError, match="NON_LOOPBACK_WITHOUT_TOKEN"):
        load(flags={"bind_addr": address, "auth.optional": True})
    assert load(flags={"bind_addr": address, "auth.token": TOKEN})


def test_an_identity_is_no_way_back_to_the_token() -> None:
    """Six hex digits of SHA-256, the same for the same token."""
    assert re.fullmatch(r"token:[0-9a-f]{6}", IDENTITY)
    assert who("192.0.2.1", bearer()) == who("127.0.0.1", bearer()) == IDENTITY
    assert who("192.0.2.1", bearer("x" * 16), token="x" * 16) != IDENTITY


# -- tickets ---------------------------------------------------------------------------------------


def test_a_ticket_opens_what_it_was_made_for() -> None:
    """The right one passes without a word."""
    check_ticket("t1ck3t", "t1ck3t")


@pytest.mark.parametrize(
    ("given", "ticket"),
    [
        ("t1ck3", "t1ck3t"),
        ("", "t1ck3t"),
        ("t1ck3t", None),
        ("", None),
        ("\u00e9\udcff", "t1ck3t"),
        ("x" * 1_000_000, "t1ck3t"),
    ],
)
def test_any_other_ticket_opens_nothing(given: str, ticket: str | None) -> None:
    """Whether the task is unknown or the ticket wrong is not told apart."""
    with pytest.raises(BadToken, match=r"^this ticket opens no such stream$") as error:
        check_ticket(given, ticket)
    assert error.value.headers == {"WWW-Authenticate": "Bearer"}
    assert not isinstance(error.value, MissingToken)


# -- anything at all -------------------------------------------------------------------------------

NAMES = st.sampled_from(["localhost", "Workstation", "llm.example.com", "evil.example", "127.0.0.1", "[::1]"])
ADDRESSES = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map("[{}]".format)
HOSTS = st.one_of(
    NAMES,
    ADDRESSES,
    st.text("0123456789.", max_size=16),
    st.text("0123456789abcdef:.", max_size=12).map("[{}]".format),
    st.text("localhst.-:[]@%0123456789", max_size=20),
    st.text(max_size=12),
)
PORTS = st.just("") | st.integers(0, 99_999).map(":{}".format) | st.text(":0123456789x", max_size=4)


def is_ours(host: str) -> bool:
    """The rule in other words: a name of ours or an address as inet_pton reads it, and perhaps a port."""
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name = host
    elif not (1 <= len(port) <= 5 and set(port) <= set("0123456789")):
        return False
    if name.lower() in ("localhost", "workstation", "llm.example.com"):
        return name.isascii()
    six = name.startswith("[") and name.endswith("]")
    try:
        socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, name[1:-1] if six else name)
    except (OSError, ValueError):
        return False
    return True


@given(HOSTS, PORTS)
@settings(deadline=None, max_examples=500)
def test_any_host_is_judged_by_the_rule(name: str, port: str) -> None:
    """The gate and an independent reading of the rule agree, and nothing but the refusal comes out [T1]."""
    host = name + port
    assert site(Host=host) == ("ok" if is_ours(host) else "FORBIDDEN_HOST")


@given(
    NAMES | ADDRESSES,
    st.sampled_from(["", ":80", ":8080"]),
    st.sampled_from(["http://", "https://", "HTTP://", "file://", "://", ""]),
    st.none() | HOSTS,
    st.sampled_from(["", ":80", ":8080", "/"]),
)
@settings(deadline=None, max_examples=300)
def test_any_origin_is_judged_by_the_rule(
    name: str, port: str, scheme: str, other: str | None, other_port: str
) -> None:
    """It passes if and only if it is http(s) and has the Host's very host and port [T2]."""
    host = name + port
    origin = scheme + (name if other is None else other) + other_port
    same = origin[:7] == "http://" and origin[7:].lower() == host.lower()
    same = same or (origin[:8] == "https://" and origin[8:].lower() == host.lower())
    expected = "ok" if same else "FORBIDDEN_ORIGIN"
    assert site(Host=host, Origin=origin) == (expected if is_ours(host) else "FORBIDDEN_HOST")
