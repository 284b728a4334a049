"""Who may ask, over HTTP: hosts, origins, tokens and tickets, on every route."""

import pytest

from llorch.api import ROUTES
from tests.fakes import FakeLlamaServer
from tests.live import TOKEN, Live, eventually, names, refused

PROFILES = pytest.mark.parametrize("profile", ["mvp", "home"])
AUTH = {"auth": {"token": TOKEN}}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PAGE = "http://page.example:3000"
CORS = {"http": {"cors_origins": [PAGE]}}
EVERYWHERE = [(method, path.format(task_id="x", pool_id="default")) for method, path, _ in ROUTES]
EVERYWHERE += [("GET", "/nope"), ("PUT", "/health"), ("OPTIONS", "/v1/tasks"), ("HEAD", "/health")]
PROTECTED = [(method, path) for method, path in EVERYWHERE if path != "/"]


# -- Host and Origin -------------------------------------------------------------------------------

HOSTILE_HOSTS = [
    *("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "other-machine", "lôcalhost"),
    *("localhost.", "a@localhost", "localhost:x", "localhost:80:80", "localhost/", "localhost\x7f"),
    *("2130706433", "0x7f.1", "127.1", "0177.0.0.1", "[::1", "[fe80::1%25eth0]", "*", " ", "localhost, ::1"),
]
OUR_HOSTS = [
    *("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:65535", "[::1]:99", "192.168.7.7"),
    *("my.box", "My.Box:1"),
]
WRONG_TOKENS = [
    *("", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"),
    *(f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN}, Bearer {TOKEN}", "Bearer tökén", "Bearer " + "x" * 8000),
]


@PROFILES
@pytest.mark.parametrize("host", HOSTILE_HOSTS)
async def test_a_host_that_is_not_ours(fake_engine: FakeLlamaServer, host: str, profile: str) -> None:
    """403 on every route, with the token and without, or the parser's 400: so no DNS rebinding [T1]."""
    async with Live(fake_engine, profile=profile) as live:
        for method, path in EVERYWHERE:
            for token in ({}, BEARER):
                sent = "".join(f"{name}: {value}\r\n" for name, value in token.items())
                request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{sent}Connection: close\r\n\r\n"
                answer = await live.raw(request.encode())
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.split()[1] in (b"400", b"403")
                if head.split()[1] == b"403":
                    assert b"FORBIDDEN_HOST" in body or method == "HEAD"


@pytest.mark.parametrize("host", OUR_HOSTS)
async def test_a_host_that_is_ours(fake_engine: FakeLlamaServer, host: str) -> None:
    """Localhost, an IP literal, a configured name; any port, so that SSH tunnels work [T1]."""
    async with Live(fake_engine, {"http": {"allowed_hosts": ["my.box"]}}) as live:
        assert (await live.get("/health", headers={"Host": host})).status == 200


@PROFILES
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost:81"},
        {"Origin": "http://localhost:80.evil.example"},
        {"Origin": "file://localhost:80"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "Cross-Site", "Origin": "http://localhost:80"},
    ],
    ids=str,
)
async def test_a_page_of_another_site(
    fake_engine: FakeLlamaServer, headers: dict[str, str], profile: str
) -> None:
    """403 on every route, GET and the bodyless cancel included [T2]."""
    async with Live(fake_engine, profile=profile) as live:
        for method, path in EVERYWHERE:
            answer = await live.ask(method, path, headers={**BEARER, "Host": "localhost:80", **headers})
            assert answer.status == 403
            assert not [name for name in answer.headers if name.startswith("Access-Control")]
        answer = await live.get("/health", headers={"Host": "localhost:80", **headers})
        more = {} if "Sec-Fetch-Site" in headers else {"hint": "add the origin to http.cors_origins"}
        refused(live, answer, 403, "FORBIDDEN_ORIGIN", **more)


async def test_a_page_of_our_own(fake_engine: FakeLlamaServer) -> None:
    """The same host and port, of either scheme; no CORS header is needed, and none is sent [T3]."""
    async with Live(fake_engine) as live:
        for origin in ("http://localhost:80", "https://LOCALHOST:80"):
            headers = {"Host": "localhost:80", "Origin": origin, "Sec-Fetch-Site": "same-origin"}
            answer = await live.get("/health", headers=headers)
            assert answer.status == 200
            assert not [name for name in answer.headers if name.startswith(("Access-Control", "Vary"))]


async def test_a_page_of_a_configured_origin(fake_engine: FakeLlamaServer) -> None:
    """May read every answer, a stream and a refusal included: exact echo, Vary, never credentials [T3]."""
    async with Live(fake_engine, CORS) as live:
        headers = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
        admitted = await live.post({"prompt": "hello", "max_tokens": 1}, headers=headers)
        async with live.stream(admitted.body, headers=headers) as stream:
            await stream.rest()
            found = [admitted.headers, stream.response.headers]
        for path in ("/health", "/nope", "/v1/tasks?limit=0"):
            answer = await live.get(path, headers=headers)
            found.append(answer.headers)
        for answered in found:
            assert answered["Access-Control-Allow-Origin"] == PAGE
            assert answered["Vary"] == "Origin"
            assert "X-Backoff-Ms" in answered["Access-Control-Expose-Headers"]
            assert "Access-Control-Allow-Credentials" not in answered
        assert (await live.get("/health")).headers["Vary"] == "Origin"
        for origin in (PAGE + "0", PAGE.replace("http", "https"), "http://evil.example"):
            answer = await live.get("/health", headers={"Origin": origin})
            assert answer.status == 403
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_preflight(fake_engine: FakeLlamaServer) -> None:
    """Is answered without a token for a configured origin, and for no other; it opens nothing else [T3]."""
    async with Live(fake_engine, {**CORS, **AUTH}) as live:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        answer = await live.ask("OPTIONS", "/v1/tasks", headers={"Origin": PAGE, **asked})
        assert (answer.status, answer.body) == (204, None)
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
        assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
        assert (await live.ask("OPTIONS", "/v1/tasks", headers=asked)).status == 401
        evil = {"Origin": "http://evil.example", **asked}
        assert (await live.ask("OPTIONS", "/v1/tasks", headers=evil)).status == 403
        assert (await live.get("/v1/tasks", headers={"Origin": PAGE})).status == 401


# -- tokens ----------------------------------------------------------------------------------------


@PROFILES
async def test_every_route_needs_the_token(fake_engine: FakeLlamaServer, profile: str) -> None:
    """401 MISSING_TOKEN or BAD_TOKEN with WWW-Authenticate, before anything is said of routes [T4]."""
    async with Live(fake_engine, AUTH, profile=profile) as live:
        for method, path in PROTECTED:
            for headers, code in ({}, "MISSING_TOKEN"), ({"Authorization": "Bearer wrong"}, "BAD_TOKEN"):
                answer = await live.ask(method, path, headers=headers)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                if method != "HEAD":
                    hint = "send Authorization: Bearer <the configured auth.token>"
                    refused(live, answer, 401, code, hint=hint)
        assert (await live.get("/health", headers=BEARER)).status == 200


@pytest.mark.parametrize(
    "given",
    WRONG_TOKENS,
    ids=lambda text: text[:20] + str(len(text)),
)
async def test_tokens_that_do_not_match(fake_engine: FakeLlamaServer, given: str) -> None:
    """Malformed, non-ASCII or huge, they are bad tokens, and none is echoed [T4, T18]."""
    async with Live(fake_engine, AUTH) as live:
        answer = await live.get("/health", headers={"Authorization": given})
        assert (answer.status, answer.body["code"]) == (401, "BAD_TOKEN")
        assert TOKEN not in str(answer)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_token(fake_engine: FakeLlamaServer, scheme: str) -> None:
    """Opens the door; the name of the scheme has no case [T4]."""
    async with Live(fake_engine, AUTH) as live:
        assert (await live.get("/health", headers={"Authorization": f"{scheme} {TOKEN}"})).status == 200


async def test_two_tokens(fake_engine: FakeLlamaServer) -> None:
    """Two Authorization headers are a 400, with a token configured or not [T4]."""
    twice = f"Authorization: Bearer {TOKEN}\r\n" * 2
    for settings in ({}, AUTH):
        async with Live(fake_engine, settings) as live:
            head = f"GET /health HTTP/1.1\r\nHost: localhost\r\n{twice}Connection: close\r\n\r\n"
            assert b" 400 " in await live.raw(head.encode())


async def test_an_optional_token(fake_engine: FakeLlamaServer) -> None:
    """Direct loopback peers need none, but a wrong one is wrong; whoever comes by a proxy needs it [T7]."""
    async with Live(fake_engine, {"auth": {"token": TOKEN, "optional": True}}) as live:
        assert (await live.get("/health", headers={})).status == 200
        wrong = {"Authorization": "Bearer wrong"}
        assert (await live.get("/health", headers=wrong)).status == 401
        for name in ("Forwarded", "X-Forwarded-For", "x-forwarded-proto", "X-Real-IP", "Via", "CF-Ray"):
            answer = await live.get("/health", headers={name: "x"})
            assert (answer.status, answer.body["code"]) == (401, "MISSING_TOKEN")
        assert (await live.get("/health", headers={"Tailscale-User-Login": "x"})).status == 401
        assert (await live.get("/health", headers={"Via": "x", **BEARER})).status == 200


async def test_a_trusted_proxy(fake_engine: FakeLlamaServer) -> None:
    """With `trust_proxy_auth` any Authorization that a proxy passes on counts, and none else [T7]."""
    async with Live(fake_engine, {"auth": {"token": TOKEN, "trust_proxy_auth": True}}) as live:
        basic = {"Authorization": "Basic dTpw"}
        assert (await live.get("/health", headers={"Via": "x", **basic})).status == 200
        assert (await live.get("/health", headers=basic)).status == 401
        assert (await live.get("/health", headers={"Via": "x", "Authorization": ""})).status == 401
        assert (await live.get("/health", headers={"Via": "x"})).status == 401


# -- tickets ---------------------------------------------------------------------------------------


async def test_a_ticket_opens_its_stream_and_nothing_else(fake_engine: FakeLlamaServer) -> None:
    """`stream_url` works without the token, again and again; for no other route and no other task [T4]."""
    async with Live(fake_engine, AUTH) as live:
        task, other = await live.submit(max_tokens=1), await live.submit(max_tokens=1)
        path, _, ticket = task["stream_url"].partition("?")
        assert len(ticket.removeprefix("ticket=")) == 32
        await live.events(task)
        live.headers = {}
        for last_event_id in (None, 0):
            events = await live.events(task, last_event_id)
            assert names(events).endswith("token end")
        answer = await live.get(f"{task['stream_url']}&last_event_id=9")
        assert answer.status == 204
        wrong = [
            "ticket=",
            "ticket=" + "0" * 32,
            "ticket=%ff",
            f"x=1&{other['stream_url'].partition('?')[2]}",
        ]
        for query in [*wrong, f"{ticket}0"]:
            answer = await live.get(f"{path}?{query}")
            assert (answer.status, answer.body["code"]) == (401, "BAD_TOKEN")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for method, route in PROTECTED:
            answer = await live.ask(method, f"{route}?{ticket}")
            assert answer.status == 401
        plain = f"/v1/tasks/{task['task_id']}"
        for method, route in ("GET", plain), ("POST", f"{plain}/cancel"), ("HEAD", path), ("POST", path):
            assert (await live.ask(method, f"{route}?{ticket}")).status == 401
        assert (await live.get(path)).body["code"] == "MISSING_TOKEN"
        evil = {"Origin": "http://evil.example"}
        assert (await live.get(task["stream_url"], headers=evil)).status == 403


async def test_tickets_are_only_where_tokens_are(fake_engine: FakeLlamaServer) -> None:
    """Without a token the path is bare, and a ticket that is sent anyway does no harm."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=1)
        assert task["stream_url"] == f"/v1/tasks/{task['task_id']}/stream"
        events = await live.events({"stream_url": f"{task['stream_url']}?ticket=x"})
        assert names(events) == "started token end"


async def test_a_ticket_counts_as_a_reader(fake_engine: FakeLlamaServer) -> None:
    """And its reader leaves as any other."""
    fake_engine.hold = True
    async with Live(fake_engine, AUTH) as live:
        task = await live.submit_held()
        async with live.session.get(task["stream_url"]) as response:
            await response.content.readline()
            assert live.orchestrator._reader_count == 1
        await eventually(lambda: live.orchestrator._reader_count == 0, "the reader is left")
