"""Every page of the site, in a real Chromium, as wide as a desk's screen and as a phone's.
`make test-site`, outside CI.

Needs Debian's `chromium`. Pictures of some pages go to build/pictures.
"""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import sync_playwright

from rotlib.disk import ROOT

SITE = ROOT / "build" / "site"
PICTURES = ROOT / "build" / "pictures"
PAGES = sorted(
    str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts
)
PICTURED = {
    "index.html": "landing",
    "notebooks/03_optrot_w4.html": "notebook",
    "docs/claims/optrot-is-better-than-hadamard-w4a16-gptq.html": "claim",
    "docs/api.html": "api",
}
WIDTHS = (1280, 390)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *of_a_request):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=SITE)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "make test-site needs a Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_every_notebook_and_claim_has_a_page():
    assert {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")} <= {
        *PAGES
    }
    assert sum(name.startswith("docs/claims/") for name in PAGES) > 20
    assert {*PICTURED} <= {*PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_on_a_desk_and_on_a_phone(name, address, browser):
    """No error in its console, no picture or page of ours that isn't there, nothing beyond the
    phone's edge that can't be scrolled to by itself.
    """
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 900})
        said, answers = [], []
        for event, kept in (("console", said), ("pageerror", said), ("response", answers)):
            page.on(event, lambda what, kept=kept: kept.append(what))
        page.goto(f"{address}/{name}", wait_until="load")
        assert [answer.url for answer in answers if answer.status >= 400] == []
        assert [str(line) for line in said if getattr(line, "type", "error") == "error"] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        links = page.evaluate("[...document.links].map(link => link.href.split('#')[0])")
        ours = {link.removeprefix(f"{address}/") for link in links if link.startswith(address)}
        assert not [link for link in ours if link and not (SITE / link).exists()]
        if label := PICTURED.get(name):
            PICTURES.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=PICTURES / f"{label}_{width}.png")
        page.close()


def test_the_search_finds_a_public_name(address, browser):
    page = browser.new_page()
    page.goto(f"{address}/search.html?q=gsr_rotation")
    page.locator("#search-results li a").first.wait_for(timeout=20_000)
    assert page.locator("#search-results li a", has_text="public names").count()
    page.close()
