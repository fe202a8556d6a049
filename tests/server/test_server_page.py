"""The page at / in a real browser, against a real server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import orjson
import pytest

from tests.serving import KEY, Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Route

ROUTE = "/api/v3/inference/reranker"
METHODS = ("fast", "standard", "optimal", "best", "maxsim")
QUERY = "purple elephants dancing"
DOCUMENTS = [  # some of these have a negative cosine
    "HTTP 404", "An elephant in a purple dress", "numbers 1 2 3", "SELECT name FROM users WHERE id = 3;", "Elephants dance.", "Diesel fuel tax rebate form",
    "Quarterly balance sheet of the holding company.",
]  # fmt: skip
HOSTILE = [
    "<img src=x onerror=\"window.hacked = 'img'\">", "<script>window.hacked = 'script'</script>", "</textarea></pre><b>bold</b>", """it's "quoted" \\ `date` $HOME !!""",
    "🐘 ﷽ 👩‍🚀", "\u202eمرحبا بالعالم\u202c", "&lt;i&gt; &amp; %3Cb%3E", "'; window.hacked = 'quote'; '", "{{7*7}} ${window.hacked = 'template'}",
]  # fmt: skip


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A new tab with the page open and the key in its field. Each test has its own."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]) as context:
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        opened(tab, server)
        yield tab


def opened(page: Page, server: Server, key: str = KEY) -> None:
    page.goto(f"{server.url}/#key={key}")
    page.select_option("#model_cross", "minilm-cross")


def fill(page: Page, documents: list[str] = DOCUMENTS, query: str = QUERY) -> None:
    page.fill("#query", query)
    page.fill("#documents", "\n".join(documents))


def shows(page: Page, selector: str, pattern: str) -> str:
    """Waits until the selected element's text matches the pattern. Returns the text."""
    found = page.locator(selector).filter(has_text=re.compile(pattern, re.DOTALL))
    found.wait_for()
    return found.inner_text()


def run(page: Page, ends: str = "^Done") -> None:
    page.click("#run")
    shows(page, "#status", ends)


def body(method: str, documents: list[str] = DOCUMENTS, **more: Any) -> dict[str, Any]:
    """The request that the page should make, written without the page's code."""
    cross = {"model_cross": "minilm-cross"} if method in ("standard", "optimal") else {}
    return {"model": "all-MiniLM-L6-v2", "query": QUERY, "documents": documents, "method": method, **cross, **more}


def column(page: Page, method: str) -> list[dict[str, Any]]:
    """The content of a column, row by row."""
    rows: list[dict[str, Any]] = page.locator(f"#{method} li").evaluate_all(
        """rows => rows.map((row) => {
          const [track, bar, zero] = [".track", ".bar", ".track .zero"].map((name) => row.querySelector(name).getBoundingClientRect());
          const data = row.querySelector("data"), text = row.querySelector(".text");
          return { index: Number(row.dataset.index), score: Number(data.value), shown: data.textContent, text: text.textContent, children: text.children.length,
            moved: row.querySelector(".moved").textContent.trim(), from: bar.left - track.left, to: bar.right - track.left, zero: zero.left - track.left, width: track.width };
        })"""
    )
    return rows


def test_page_opens_and_runs_without_errors_and_asks_nobody_else(browser: Browser, server: Server) -> None:
    said: list[str] = []
    asked: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        opened(page, server)
        run(page)  # with the sample that the page shows at first
        assert page.locator("#best li").count() == page.locator("#fast li").count() >= 8
        markup = page.content()
    assert said == []
    assert asked.count(server.url + ROUTE) == len(METHODS)
    assert [url for url in asked if not url.startswith((f"{server.url}/", "data:"))] == []
    assert re.findall(r"""(?:src|href)=["'](?!data:)[^"']*//""", markup) == []


def test_docs_show_the_contract_and_ask_nobody_else(page: Page, server: Server) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/docs")
    shows(page, "#operations-default-rerank_v3_api_v3_inference_reranker_post", "/api/v3/inference/reranker")
    assert [url for url in asked if not url.startswith((f"{server.url}/", "data:"))] == []


def test_key_of_the_fragment_leaves_the_address_and_stays_in_the_tab_alone(page: Page, server: Server) -> None:
    assert page.evaluate("location.href") == f"{server.url}/"
    assert page.evaluate("[history.length, sessionStorage.length, localStorage.length, document.cookie]") == [2, 1, 0, ""]
    page.goto(f"{server.url}/?here")
    assert page.input_value("#key") == KEY
    page.evaluate("location.hash = '#key=an%2Bother%20one'")
    page.wait_for_url(f"{server.url}/?here")
    assert page.input_value("#key") == "an+other one"
    assert page.get_attribute("#key", "type") == "password"


@pytest.mark.parametrize("options", [{}, {"top_n": 4, "stage1_top_k": 3, "max_tokens_per_doc": 2, "return_documents": True}], ids=["defaults", "options"])
def test_columns_are_what_the_server_answers(page: Page, server: Server, options: dict[str, Any]) -> None:
    fill(page)
    for name, value in options.items():
        page.check(f"#{name}") if value is True else page.fill(f"#{name}", str(value))
    run(page)
    first: list[int] = []
    for method in METHODS:
        status, answer, _ = server.post(body(method, **options))
        results, rows = answer["results"], column(page, method)
        assert status == 200 and len(rows) == len(results) > 0
        assert [row["index"] for row in rows] == [result["index"] for result in results]
        assert [row["score"] for row in rows] == pytest.approx([result["relevance_score"] for result in results], abs=1e-6)
        assert [row["text"] for row in rows] == [DOCUMENTS[result["index"]] for result in results]
        for row in rows:
            assert float(row["shown"].replace("−", "-")) == pytest.approx(row["score"], abs=5e-5, rel=0.05)
        first = first or [row["index"] for row in rows]
        for rank, row in enumerate(rows):
            by = first.index(row["index"]) - rank if row["index"] in first else None
            expected = "" if method == "fast" else "new" if by is None else f"↑ {by}" if by > 0 else f"↓ {-by}" if by < 0 else "="
            assert row["moved"].startswith(expected) and bool(row["moved"]) == bool(expected)
        page.check(f"input[name=shown][value={method}]")
        assert orjson.loads(page.inner_text("#answer"))["meta"] == answer["meta"]
        sent = orjson.loads(page.inner_text("#request"))
        assert {"return_documents": False} | body(method, **{k: v for k, v in options.items() if k in sent}) == sent
        assert options.keys() - sent.keys() <= ({"stage1_top_k"} if method in ("fast", "standard") else set())
    dropped = "4 dropped by stage 1" if options else "7 of 7"
    assert dropped in page.inner_text("#best .message")


def test_best_takes_the_cross_encoder_where_it_is_given(page: Page, server: Server) -> None:
    fill(page)
    page.check("#best_cross")
    run(page)
    _, answer, _ = server.post(body("best", model_cross="minilm-cross"))
    assert [row["score"] for row in column(page, "best")] == pytest.approx([result["relevance_score"] for result in answer["results"]], abs=1e-6)


def test_bars_follow_the_scores_and_negative_ones_point_left(page: Page) -> None:
    fill(page)
    run(page)
    for method in METHODS:
        rows = column(page, method)
        scale = rows[0]["to"] - rows[0]["from"]
        for row in rows:
            assert row["to"] - row["from"] == pytest.approx(scale * abs(row["score"]) / rows[0]["score"], abs=0.5)
            assert (row["to"] if row["score"] < 0 else row["from"]) == pytest.approx(max(row["zero"], 0), abs=0.5)
            assert -0.5 <= row["from"] <= row["to"] <= row["width"] + 0.5
        assert 0.4 * rows[0]["width"] <= scale
        assert (min(row["score"] for row in rows) < 0) == (method == "fast"), "the documents no longer have a negative cosine"


def test_times_are_the_servers_own_beside_the_wall(page: Page) -> None:
    with page.expect_response(lambda answer: answer.url.endswith(ROUTE) and '"best"' in (answer.request.post_data or "")) as answer:
        run(page)
    spent = {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", answer.value.headers["server-timing"])}
    wall, total, model = re.findall(r"([\d.,]+) ms wall, ([\d.,]+) ms server.*model ([\d.]+)", page.inner_text("#best .time"), re.DOTALL)[0]
    assert float(total) == pytest.approx(spent["total"], abs=0.51)
    assert float(model) == pytest.approx(spent["model"], abs=0.51)
    assert float(wall) >= float(total) - 0.1


def test_wrong_key_is_said_by_its_field(page: Page) -> None:
    wrong = {"not-the-key": "401: the server does not know this key", "": "401: the server asks for a key", "ключ": "no header"}
    for key, said in wrong.items():
        page.fill("#key", key)
        assert page.get_attribute("#key", "aria-invalid") == "false" and "401" not in page.inner_text("#key-note")
        run(page, "^5 of 5 methods failed")
        assert said in page.inner_text("#key-note") and page.is_visible("#key-note")
        assert (page.get_attribute("#key", "aria-invalid"), page.get_attribute("#key", "aria-describedby")) == ("true", "key-note")
        assert page.evaluate("document.activeElement.id") == "key"
        for method in METHODS:
            assert "key" in page.inner_text(f"#{method} .message") and not column(page, method)
    page.fill("#key", KEY)
    page.press("#query", "Control+Enter")
    shows(page, "#status", "^Done")
    assert page.get_attribute("#key", "aria-invalid") == "false"


def test_failures_are_said_in_their_own_column(page: Page) -> None:
    queue: list[Callable[[Route], None]] = [
        lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json={"detail": "The queue is full of work."}),
        lambda route: route.fulfill(status=503, headers={"Retry-After": "5"}, json={"detail": "The server is draining."}),
        lambda route: route.abort("connectionrefused"),
        *[lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>")] * 2,
    ]
    page.route(f"**{ROUTE}", lambda route: queue.pop(0)(route))
    run(page, "^5 of 5 methods failed")
    said = {method: page.inner_text(f"#{method} .message") for method in METHODS}
    assert all(part in said["fast"] for part in ("429", "queue is full of work", "again in 7 s"))
    assert all(part in said["standard"] for part in ("503", "draining", "again in 5 s"))
    assert "cannot be reached" in said["optimal"]
    assert "502" in said["best"] and "<h1>Bad gateway</h1>" in said["best"]
    page.unroute(f"**{ROUTE}")
    page.fill("#top_n", "0")
    page.fill("#stage1_top_k", "many")
    run(page, "^5 of 5 methods failed")
    assert "422" in page.inner_text("#fast .message") and "body.top_n: Input should be greater than or equal to 1" in page.inner_text("#fast .message")
    assert "body.stage1_top_k: Input should be a valid integer" in page.inner_text("#best .message")
    page.fill("#top_n", "")
    page.fill("#stage1_top_k", "")
    page.locator("#model_cross option:checked").evaluate("option => { option.value = 'nobody'; }")
    run(page, "^2 of 5 methods failed")
    assert "404" in page.inner_text("#optimal .message") and "model_cross: no such model" in page.inner_text("#optimal .message")
    assert column(page, "fast") and column(page, "best")


def test_hostile_text_is_text(page: Page) -> None:
    dialogs: list[str] = []

    def seen(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", seen)
    fill(page, HOSTILE, query="<img src=x onerror=\"window.hacked = 'query'\"> it's")
    for echo in (False, True):
        page.set_checked("#return_documents", echo)
        run(page)
        for method in METHODS:
            rows = column(page, method)
            assert sorted(row["text"] for row in rows) == sorted(HOSTILE)
            assert not any(row["children"] for row in rows)
        answer = orjson.loads(page.inner_text("#answer"))
        assert sorted(result.get("document", "") for result in answer["results"]) == (sorted(HOSTILE) if echo else [""] * len(HOSTILE))
        assert page.locator("img, main script, li b, pre *").count() == 0
    page.route(f"**{ROUTE}", lambda route: route.fulfill(status=404, json={"detail": HOSTILE[0]}))
    run(page, "^5 of 5 methods failed")
    assert HOSTILE[0] in page.inner_text("#best .message")
    assert page.evaluate("window.hacked") is None and dialogs == []


@pytest.mark.parametrize("size", [0, 200_000], ids=["short", "longer than an argument may be"])
@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="no curl or no bash")
def test_copied_curl_line_gives_the_columns_answer(page: Page, size: int) -> None:
    fill(page, [*HOSTILE, "END_OF_JSON", "@/etc/passwd", "x y " * (size // 4) + "z"], query='it\'s "quoted"')
    page.fill("#max_tokens_per_doc", "20")
    page.check("input[name=shown][value=standard]")
    run(page)
    page.click("#copy")
    shows(page, "#copy", "^Copied$")
    line = page.evaluate("navigator.clipboard.readText()")
    assert line == page.evaluate("document.getElementById('curl').textContent")
    assert KEY not in line and "Bearer $RERANK_LAB_API_KEY" in line
    done = subprocess.run(["bash", "-s"], input=line, capture_output=True, text=True, check=True, timeout=30, env=os.environ | {"RERANK_LAB_API_KEY": KEY})
    answer, rows = orjson.loads(done.stdout), column(page, "standard")
    assert answer["meta"]["method"] == "standard" and len(rows) == len(HOSTILE) + 3
    assert [row["index"] for row in rows] == [result["index"] for result in answer["results"]]
    assert [row["score"] for row in rows] == pytest.approx([result["relevance_score"] for result in answer["results"]], abs=1e-6)


def test_no_width_scrolls_sideways(page: Page) -> None:
    fill(page, [*DOCUMENTS, "w" * 500, "a long document " * 100])
    run(page)
    page.locator("#fast li[data-index='8'] button").press("Enter")
    for width, side_by_side in ((360, 1), (768, 2), (1280, 5), (1600, 5)):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        places = page.locator("#columns article").evaluate_all("nodes => nodes.map((node) => [node.offsetLeft, node.offsetTop])")
        assert len({left for left, _ in places}) == side_by_side
        assert len({top for _, top in places}) == -(-len(METHODS) // side_by_side)
        outside = "nodes => nodes.map((node) => node.getBoundingClientRect()).filter((box) => box.width && (box.left < 0 || box.right > innerWidth)).length"
        assert page.locator("#columns li *, input, select, textarea, pre, button").evaluate_all(outside) == 0
        assert page.locator(".text, .message, pre").evaluate_all("nodes => nodes.filter((node) => node.scrollWidth > node.clientWidth).length") == 0


def test_long_document_is_clamped_until_somebody_asks(page: Page) -> None:
    long = "a long document, told slowly. " * 400
    fill(page, [*DOCUMENTS, long])
    run(page)
    row = page.locator("#fast li[data-index='7']")
    height = row.evaluate("node => node.offsetHeight")
    assert height < 120
    assert page.locator("#fast li[data-index='0'] button").is_hidden()
    row.get_by_role("button", name="all of document 7").press("Enter")
    assert row.locator(".text").evaluate("node => node.textContent") == long
    assert row.evaluate("node => node.offsetHeight") > 10 * height
    assert row.locator("button").get_attribute("aria-expanded") == "true"
    row.get_by_role("button", name="less of document 7").click()
    assert row.evaluate("node => node.offsetHeight") == height


def test_second_click_aborts_the_first_run(page: Page) -> None:
    held: list[Route] = []
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.failure or ""))

    def hold_the_first(route: Route) -> None:
        held.append(route)
        if len(held) > 1:
            route.continue_()

    page.route(f"**{ROUTE}", hold_the_first)
    with page.expect_request(f"**{ROUTE}"):
        page.click("#run")
    shows(page, "#fast.running .message", "^Running")
    shows(page, "#best.waiting .message", "^Waiting")
    assert page.get_attribute("#fast", "aria-busy") == "true"
    fill(page)
    run(page)
    assert failed == ["net::ERR_ABORTED"]
    assert len(column(page, "fast")) == len(column(page, "best")) == len(DOCUMENTS)
    assert page.get_attribute("#fast", "aria-busy") == "false"
    page.fill("#query", "another")
    shows(page, "#status", "inputs have changed")


def test_models_are_waited_for_while_the_server_loads(browser: Browser, server: Server) -> None:
    refused = [0]

    def loading(route: Route) -> None:
        refused[0] += 1
        if refused[0] > 2:
            route.continue_()
        else:
            route.fulfill(status=503, headers={"Retry-After": "0.2"}, json={"detail": "The server is loading; try again later."})

    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.route("**/api/v3/models", loading)
        page.goto(server.url)
        shows(page, "#status", "503.*The server is loading")
        shows(page, "#status", "^$")
        known = server.get("/api/v3/models")[1]["models"]
        for field, role in (("model", "bi-encoder"), ("model_cross", "cross-encoder")):
            offered = page.locator(f"#{field} option").evaluate_all("options => options.map((option) => option.value)")
            assert offered == [model["id"] for model in known if model["role"] == role]
    assert refused[0] == 3


def test_every_field_has_a_label_and_every_text_contrast(page: Page) -> None:
    fill(page)
    run(page)
    unlabelled = "fields => fields.filter((field) => ![...field.labels].some((label) => label.textContent.trim())).map((field) => field.id)"
    assert page.locator("input, select, textarea").evaluate_all(unlabelled) == []
    assert page.locator("#status[role=status]").count() == 1
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 380) == (scheme == "light")
        texts, weak = page.locator("body *").evaluate_all(
            """nodes => {
              const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
              const light = (colour) => numbers(colour).slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
              const behind = (node) => { const own = getComputedStyle(node).backgroundColor; return (numbers(own)[3] ?? 1) ? own : behind(node.parentElement); };
              const texts = nodes.filter((node) => node.offsetParent && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
              const pair = (node) => [getComputedStyle(node).color, behind(node)].map(light).sort((a, b) => b - a);
              const contrast = (node) => (pair(node)[0] + 0.05) / (pair(node)[1] + 0.05);
              return [texts.length, texts.filter((node) => contrast(node) < 4.5).map((node) => node.outerHTML)];
            }"""
        )
        assert texts > 60 and weak == []
