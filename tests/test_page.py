"""The page at `/`: what it may do, by its headers; and what it does, in a real Chromium."""

import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, expect

from tests import child
from tests.fakes import PATIENCE_S, FakeLlamaServer, answers, error
from tests.live import TOKEN, Live, eventually
from tests.pools import written

PROFILES = pytest.mark.parametrize("profile", ["mvp", "home"])
AUTH = {"auth": {"token": TOKEN}}
ONE_SLOT = {"adapter": {"slots": 1}}
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\u2028&amp;"
expect.set_options(timeout=PATIENCE_S * 1000)


# -- its headers -----------------------------------------------------------------------------------


async def test_the_policy_names_what_is_in_the_page(fake_engine: FakeLlamaServer) -> None:
    """Its script and its style by their hashes, this server, and nothing else."""
    async with Live(fake_engine) as live, live.session.get("/") as response:
        body = await response.text()
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["Cache-Control"] == "no-store"
        assert "X-Correlation-Id" in response.headers
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


async def test_the_page_loads_nothing_from_anywhere(fake_engine: FakeLlamaServer) -> None:
    """No link to another host, no inline handler, no way for a text to become markup."""
    async with Live(fake_engine) as live, live.session.get("/") as response:
        body = await response.text()
    addresses = set(re.findall(r"https?://[^\s\"'>]+", body))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a namespace, which nobody loads"
    words = "innerHTML outerHTML insertAdjacentHTML document.write eval( localStorage sessionStorage cookie"
    assert [word for word in words.split() if word in body] == []
    assert not re.search(r"<[^>]+\s(on\w+|style)=", body.partition("<script>")[0])


@PROFILES
async def test_the_page_is_open_and_says_nothing(fake_engine: FakeLlamaServer, profile: str) -> None:
    """Without a token, with a wrong one, and by HEAD; the same bytes for everybody."""
    async with Live(fake_engine, AUTH, profile=profile) as live:
        bodies = set()
        for headers in ({}, {"Authorization": "Bearer wrong"}, live.headers):
            async with live.session.get("/", headers=headers) as response:
                assert response.status == 200
                assert ("X-Correlation-Id" in response.headers) is (profile == "mvp")
                bodies.add(await response.read())
        assert len(bodies) == 1
        head = await live.ask("HEAD", "/", headers={})
        assert (head.status, head.headers["Content-Length"]) == (200, str(len(bodies.pop())))
        assert (await live.ask("POST", "/", headers={})).status == 401
        assert (await live.ask("POST", "/")).status == 405


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ("/", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, 200),
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ("/", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Origin": "null"}, 403),
        ("/", {"Sec-Fetch-Mode": "navigate", "Host": "evil.example"}, 403),
        ("/v1/status", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ("/health", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
    ],
    ids=str,
)
async def test_a_link_on_another_site_may_lead_here(
    fake_engine: FakeLlamaServer, path: str, headers: dict[str, str], status: int
) -> None:
    """To the page, by navigation, and to nothing else [T1, T2]."""
    async with Live(fake_engine) as live, live.session.get(path, headers=headers) as response:
        assert response.status == status


# -- in a browser ----------------------------------------------------------------------------------


class Visit:
    """One page, open; `faults` is what the console and the page itself complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.faults: list[str] = []
        self.urls: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda fault: self.faults.append(str(fault)))
        page.on("dialog", lambda dialog: self.faults.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: self.urls.append(request.url))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    async def shows(self, selector: str, text: str | re.Pattern[str]) -> None:
        """Return once the first element of `selector` has this text."""
        await expect(self.page.locator(selector).first).to_have_text(text)

    async def output(self) -> str:
        """What the watched task has said so far."""
        return await self.page.locator("#out").text_content() or ""

    async def submit(self, prompt: str = "hello", **fields: int) -> None:
        """Fill in the form and send it."""
        await self.page.fill("#prompt", prompt)
        for name, value in fields.items():
            await self.page.fill(f"#{name.replace('_', '-')}", str(value))
        await self.page.click("#submit")


@contextlib.asynccontextmanager
async def visiting(
    browser: Browser, live: Live | child.Child, *, faults: str = "", **options: Any
) -> AsyncIterator[Visit]:
    """The page of `live`; at the end it must have had no fault but those that match `faults`."""
    visit = Visit(await browser.new_page(**options))
    await visit.page.goto(live.url)
    yield visit
    await visit.page.close()
    assert [fault for fault in visit.faults if not (faults and re.search(faults, fault))] == []


@pytest.fixture
def held(fake_engine: FakeLlamaServer) -> FakeLlamaServer:
    """A fake engine that gives out only what the test lets out."""
    fake_engine.hold = True
    return fake_engine


async def test_a_prompt_is_submitted_and_its_tokens_appear(browser: Browser, held: FakeLlamaServer) -> None:
    """One by one, with the counts at the end; the fields go out as they were filled in."""
    async with Live(held) as live, visiting(browser, live) as visit:
        await visit.shows("#link-text", "Live")
        await visit.submit("Once upon a time", max_tokens=5, seed=7)
        engine = await held.started(1)
        body = engine.request.body
        assert (body["prompt"], body["n_predict"], body["seed"]) == ("Once upon a time", 5, 7)
        for text, so_far in [("there ", "there "), ("was\n", "there was\n"), ("é", "there was\né")]:
            await engine.token(text)
            await expect(visit.page.locator("#out")).to_have_text(so_far, use_inner_text=True)
        await visit.shows("#phase", "streaming")
        await engine.finish("eos")
        await visit.shows("#phase", "completed")
        await expect(visit.page.locator("#told")).to_contain_text("3 tokens")
        await expect(visit.page.locator("#cancel")).to_be_hidden()
        await visit.shows("#recent tr .badge", "completed")
        await expect(visit.page.locator("#recent tr")).to_have_count(1)
        await expect(visit.page.locator("#totals")).to_contain_text("completed1")


async def test_a_chat_message_goes_through_the_template(browser: Browser, held: FakeLlamaServer) -> None:
    """With the box ticked; and the keyboard submits."""
    async with Live(held) as live, visiting(browser, live) as visit:
        await visit.page.check("#chat")
        await visit.page.fill("#prompt", "hello")
        await visit.page.press("#prompt", "Control+Enter")
        engine = await held.started(1)
        assert engine.request.body["prompt"].startswith("<|im_start|>user\nhello")


async def test_a_waiting_task_shows_its_place_and_its_prompt(browser: Browser, held: FakeLlamaServer) -> None:
    """The metrics of its stream: position, then the prompt's progress, then the text in their place."""
    async with Live(held, ONE_SLOT) as live, visiting(browser, live) as visit:
        tasks = [await live.submit_held(), await live.submit()]
        await visit.submit("one two three")
        await visit.shows("#phase", "waiting, 1 before it")
        await expect(visit.page.locator("#active tr")).to_have_count(3)
        await visit.shows("#active tr:last-child td", "1 before it")
        await live.cancel(tasks[1])
        await visit.shows("#phase", "waiting, next")
        await live.cancel(tasks[0])
        engine = await held.started(2)
        await engine.progress(256, 1024)
        await visit.shows("#prefill-text", "256 of 1,024 tokens")
        await engine.token("x")
        await expect(visit.page.locator("#prefill")).to_be_hidden()
        assert await visit.output() == "x"


async def test_cancel_stops_the_task(browser: Browser, held: FakeLlamaServer) -> None:
    """By the button of the watched one, and by that of any other in the list."""
    async with Live(held) as live, visiting(browser, live) as visit:
        await visit.submit()
        engine = await held.started(1)
        await engine.token("a")
        await visit.shows("#out", "a")
        await visit.page.click("#cancel")
        await visit.shows("#phase", "cancelled")
        await held.closed(1)
        other = await live.submit_held()
        await visit.page.click(f"[data-key='{other['task_id']}'] button:has-text('Cancel')")
        await held.closed(2)
        assert (await live.snapshot(other))["state"] == "cancelled"
        await expect(visit.page.locator("#active tr")).to_have_count(0)


async def test_any_task_can_be_watched(browser: Browser, held: FakeLlamaServer) -> None:
    """From its start, also once it has ended."""
    async with Live(held, AUTH, profile="home") as live, visiting(browser, live, faults="401") as visit:
        await visit.page.fill("#token", TOKEN)
        await visit.page.keyboard.press("Enter")
        task = await live.submit_held()
        await held.held[0].token("from elsewhere")
        await held.held[0].finish()
        await visit.page.click(f"#recent [data-key='{task['task_id']}'] button:has-text('Watch')")
        await visit.shows("#out", "from elsewhere")
        await visit.shows("#phase", "completed, at its limit of tokens")


# -- the token -------------------------------------------------------------------------------------


async def test_the_token_is_asked_for_once(browser: Browser, held: FakeLlamaServer) -> None:
    """A wrong one is said to be wrong; the right one opens everything, and is kept nowhere."""
    async with Live(held, AUTH) as live, visiting(browser, live, faults="status of 401") as visit:
        page = visit.page
        await expect(page.locator("#token")).to_be_focused()
        await visit.shows("#link-text", "Locked")
        for given in ("wrong", f"{TOKEN}x"):
            await page.fill("#token", given)
            await page.keyboard.press("Enter")
            await visit.shows("#unlock-fault", "That is not the token of this llorch.")
            await expect(page.locator("#token")).to_have_value("")
        await page.fill("#token", f" {TOKEN} ")
        await page.keyboard.press("Enter")
        await visit.shows("#link-text", "Live")
        await expect(page.locator("#unlock")).to_be_hidden()
        await visit.submit()
        engine = await held.started(1)
        await engine.token("opened")
        await visit.shows("#out", "opened")
        assert len(visit.faults) == 3, "one 401 for each time that it was asked"
        assert [url for url in visit.urls if TOKEN in url] == []
        kept = await page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""]
        assert TOKEN not in await page.content()
        await page.reload()
        await expect(page.locator("#token")).to_be_focused()


async def test_the_token_can_be_given_later(browser: Browser, held: FakeLlamaServer) -> None:
    """Escape closes the question; nothing is asked of the server meanwhile; a button opens it again."""
    async with Live(held, AUTH) as live, visiting(browser, live, faults="status of 401") as visit:
        await expect(visit.page.locator("#token")).to_be_focused()
        await visit.page.keyboard.press("Escape")
        await expect(visit.page.locator("#unlock")).to_be_hidden()
        await visit.shows("#lost-text", "This llorch wants its token.")
        await visit.page.click("#retry")
        await visit.page.fill("#token", TOKEN)
        await visit.page.keyboard.press("Enter")
        await visit.shows("#link-text", "Live")
        assert len(visit.faults) == 1


# -- lost and found --------------------------------------------------------------------------------


async def test_a_cut_stream_goes_on_where_it_was(browser: Browser, held: FakeLlamaServer) -> None:
    """Nothing twice, nothing lost; the console hears of each cut once."""
    async with Live(held) as live, visiting(browser, live, faults="ERR_") as visit:
        await visit.submit()
        engine = await held.started(1)
        text = ""
        for index in range(6):
            await engine.token(f"{index} ")
            text += f"{index} "
            await expect(visit.page.locator("#out")).to_have_text(text.strip())
            if index in (2, 4):
                for transport in live.transports:
                    transport.abort()
                await eventually(lambda: not live.orchestrator.reader_count, "the reader is left")
        await engine.finish("eos")
        await visit.shows("#phase", "completed")
        assert await visit.output() == text
        streams = [url for url in visit.urls if "/stream?" in url]
        assert [url.partition("metrics=1")[2] for url in streams] == [
            "",
            "&last_event_id=3",
            "&last_event_id=5",
        ]


async def test_a_server_that_restarts_is_found_again(browser: Browser, held: FakeLlamaServer) -> None:
    """It is said that it is gone, then that it is back and the watched task is not; no flood of errors."""
    settings = {"adapter.endpoint": held.url, "adapter.self_test": False, "shutdown.grace_s": 0.1}
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(child.llorch(settings))
        visit = await stack.enter_async_context(visiting(browser, first, faults="ERR_"))
        await visit.submit()
        await (await held.started(1)).token("so far")
        await visit.shows("#out", "so far")
        first.process.kill()
        await first.process.wait()
        await visit.shows("#link-text", "Not reachable")
        await expect(visit.page.locator("#lost-text")).to_contain_text("can't be reached")
        port = first.address[1]
        await stack.enter_async_context(child.llorch({**settings, "bind_addr": f"127.0.0.1:{port}"}))
        await visit.page.evaluate("document.querySelector('#retry').click()")  # it may be back already
        await visit.shows("#link-text", "Live")
        await expect(visit.page.locator("#lost")).to_be_hidden()
        await visit.shows("#phase", "gone")
        assert await visit.output() == "so far"
        await visit.submit("again")
        await (await held.started(2)).token("as new")
        await visit.shows("#out", "as new")
        assert len(visit.faults) < 8


async def test_an_engine_that_is_gone_is_told_with_its_reason(
    browser: Browser, held: FakeLlamaServer
) -> None:
    """The pool says why, and a refused prompt says what to do."""
    async with Live(held) as live, visiting(browser, live, faults="status of 503") as visit:
        await visit.shows("#pools .badge", "ready")
        await held.stop()
        live.replica.suspect("for this test")
        await visit.shows("#pools .badge", "engine not reachable")
        await expect(visit.page.locator("#pools .note")).to_contain_text("is llama-server running?")
        await visit.submit()
        await expect(visit.page.locator("#form-fault")).to_contain_text("POOL_UNAVAILABLE")
        await expect(visit.page.locator("#form-fault")).to_contain_text("Try again in 2 s.")
        await held.start()


# -- what it is given ------------------------------------------------------------------------------


async def test_no_text_becomes_markup(browser: Browser, held: FakeLlamaServer) -> None:
    """Prompt, metadata, session, output and the engine's own errors are shown as they are."""
    held.script(answers(400, error(400, EVIL, "invalid_request_error")))
    async with Live(held) as live, visiting(browser, live) as visit:
        failed = await live.submit(metadata={EVIL: EVIL}, session_id=EVIL)
        await live.events(failed)
        await visit.submit(EVIL)
        engine = await held.started(2)
        assert engine.request.body["prompt"] == EVIL
        await engine.token(EVIL)
        await visit.shows("#phase", "streaming")
        assert await visit.output() == EVIL
        row = visit.page.locator(f"#recent [data-key='{failed['task_id']}']")
        await expect(row.locator(".tags")).to_contain_text(f"session {EVIL} · {EVIL}: {EVIL}")
        await expect(row.locator(".why")).to_contain_text("<img src=x onerror=alert(1)>")
        assert await visit.page.locator("img, main script").count() == 0


# -- how it looks ----------------------------------------------------------------------------------

CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgb(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility() || node.matches("script, .skip, noscript")) continue;
    const a = light(rgb(getComputedStyle(node).color)), b = light(behind(node));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${text.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""
UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, select, [role=img], progress")]
  .filter((node) => !(node.labels?.length || node.textContent.trim() || node.getAttribute("aria-label")))
  .map((node) => node.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_it_can_be_read(browser: Browser, held: FakeLlamaServer, scheme: Any, width: int) -> None:
    """On a small phone and on a desk, light and dark: nothing to the side, enough contrast, names for all."""
    size = {"width": width, "height": 800}
    held.script(answers(400, error(400, "word " * 200 + "x" * 300, "invalid_request_error")))
    async with Live(held, ONE_SLOT) as live:
        await live.events(await live.submit())
        async with visiting(browser, live, color_scheme=scheme, viewport=size) as visit:
            await visit.submit("hello")
            await (await held.started(2)).token("word " * 100 + "x" * 1000)
            await live.submit(metadata={"k" * 64: "v" * 500}, session_id="s" * 128)
            await expect(visit.page.locator("#active tr")).to_have_count(2)
            await visit.shows("#phase", "streaming")
            assert await visit.page.evaluate("() => document.documentElement.scrollWidth") == width
            assert await visit.page.evaluate(CONTRAST) == []
            assert await visit.page.evaluate(UNNAMED) == []
            background = await visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(244, 245, 248)") is (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_lanes_replicas_and_a_drain_are_shown(
    browser: Browser, held: FakeLlamaServer, scheme: Any, width: int, tmp_path: Path
) -> None:
    """Each replica with its state and its reason, both lanes, where a task runs; still to be read."""
    size, long = {"width": width, "height": 800}, "g" * 64
    more = {"gpu0": {"devices": [0], "slots": "auto"}, long: {"devices": [1, 2]}}
    async with FakeLlamaServer(build="x" * 60) as other:
        file = written(tmp_path, {"big": {"gpu0": held, long: other}}, **more)
        async with Live(held, file=file) as live:
            await eventually(lambda: live.pool.replicas[1].excluded, "nobody is kept out")
            live.pool.estimate.record(0.001)
            for _ in range(2):
                await live.submit_held(priority="batch")
            await live.submit(priority="batch")
            await live.submit()
            async with visiting(browser, live, color_scheme=scheme, viewport=size) as visit:
                await visit.shows("#pools .badge", "ready")
                replicas = visit.page.locator("#pools .replicas li")
                await expect(replicas).to_have_count(2)
                await expect(replicas.nth(0)).to_contain_text("gpu0ready2 of 2 slots at work")
                await expect(replicas.nth(0)).to_contain_text("GPU 0")
                await expect(replicas.nth(1)).to_contain_text("not ready0 of 1 slot at work")
                await expect(replicas.nth(1)).to_contain_text("it runs engine xxx")
                await expect(visit.page.locator("#pools .facts")).to_contain_text(
                    "Interactive queue1 of 64 places takenBatch queue1 of 256 places taken"
                )
                await visit.shows("#depth", "2 of 320")
                await expect(visit.page.locator("#active .tags").first).to_contain_text("gpu0 · batch")
                await expect(visit.page.locator("#active tr").last).to_contain_text("later than predicted")
                live.pool.drain(90)
                await visit.shows("#pools .badge", "drained")
                await expect(visit.page.locator("#pools .note")).to_contain_text(
                    "It takes no new tasks; what it has"
                )
                assert await visit.page.evaluate("() => document.documentElement.scrollWidth") == width
                assert await visit.page.evaluate(CONTRAST) == []


async def test_the_keyboard_is_enough(browser: Browser, held: FakeLlamaServer) -> None:
    """From the top: skip to the prompt, fill in, submit, and on to Cancel, which keeps its focus."""
    async with Live(held) as live, visiting(browser, live) as visit:
        page = visit.page
        await visit.shows("#link-text", "Live")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await expect(page.locator("#prompt")).to_be_focused()
        await page.keyboard.type("hello")
        for name in ("max-tokens", "seed", "chat", "submit"):
            await page.keyboard.press("Tab")
            await expect(page.locator(f"#{name}")).to_be_focused()
        await page.keyboard.press("Enter")
        await (await held.started(1)).token("a")
        await visit.shows("#spoken", re.compile(r"Task streaming\. 1 token"))
        await page.keyboard.press("Tab")
        await expect(page.locator("#cancel")).to_be_focused()
        await page.keyboard.press("Enter")
        await visit.shows("#phase", "cancelled")
        button = page.locator("#active button:has-text('Cancel')")
        await live.submit_held()
        await button.focus()
        await live.submit()
        await expect(page.locator("#active tr")).to_have_count(2)
        await expect(button.first).to_be_focused()
