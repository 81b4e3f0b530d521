"""Every notebook in JupyterLab, in a real Chromium: opened, run from the menu, looked at. `make
test-lab`, outside CI.

Needs Debian's `chromium`. Copies run, and figures go to figures/draft, so that notebooks/ and
figures/ stay as they are; finished runs are read from the store. Pictures of every notebook, run,
go to build/lab.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from playwright.sync_api import Page, sync_playwright

from rotlib.disk import ROOT

PICTURES = ROOT / "build" / "lab"
MINUTES = 30  # that one notebook may take
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_SETTINGS = {  # all cells stay in the page, however far down; no question about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on copies of the notebooks."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    for path in NOTEBOOKS:  # without what they show already
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell |= {"execution_count": None, "outputs": []} if cell.cell_type == "code" else {}
        nbformat.write(notebook, home / "notebooks" / path.name)
    for name, settings in _SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    environment = {
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--port=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={home / 'notebooks'}",
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        env=os.environ | {k: str(v) for k, v in environment.items()},
    )
    try:
        while not (files := list((home / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None
            time.sleep(0.1)
        yield json.loads(files[0].read_text())["url"].rstrip("/")
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def page():
    chromium = shutil.which("chromium")
    assert chromium, "make test-lab needs a Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1500, "height": 1000})
        browser.close()


def run_from_the_menu(page: Page) -> None:
    """Run all cells; returns when every one has a number, or as soon as one shows an error."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .jp-InputPrompt")
    deadline = time.monotonic() + MINUTES * 60
    while not all(re.fullmatch(r"\[\d+\]:", text) for text in prompts.all_inner_texts()):
        assert time.monotonic() < deadline, f"still running after {MINUTES} minutes"
        assert not page.locator('[data-mime-type="application/vnd.jupyter.error"]').count(), errors(
            page
        )
        time.sleep(0.5)


def errors(page: Page) -> list[str]:
    return page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_reads_well_in_jupyterlab(path, lab, page):
    notebook = nbformat.read(path, as_version=4)
    page.goto(f"{lab}/lab/tree/{path.name}?reset")
    page.locator(".jp-NotebookPanel .jp-CodeCell").first.wait_for(timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(
        timeout=60_000
    )  # what is asked of a kernel on its way is lost
    run_from_the_menu(page)
    assert errors(page) == []
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    drawn = page.locator(".jp-RenderedImage img").evaluate_all(
        "images => images.map(image => image.naturalWidth)"
    )
    assert len(drawn) == len(figures)
    assert all(drawn)
    page.get_by_role("tab", name="Table of Contents").click()
    page.locator(".jp-tocItem").first.wait_for()
    headings = [
        line.lstrip("#").strip()
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("#")
    ]
    assert [
        text.strip() for text in page.locator(".jp-tocItem-content").all_inner_texts()
    ] == headings
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{path.stem}.png")
