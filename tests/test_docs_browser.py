"""The built docs site, opened from a folder in a browser: it needs no server, and nothing from other servers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROME = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROME is None, reason="no chromium on this machine")]


def test_the_site_builds_without_warnings_and_works_from_a_folder(tmp_path: Path) -> None:
    """The search finds a word, tables scroll inside a narrow page, and no page asks another server for anything."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROME, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
        for name in ("index", "configuration", "configuration/benchmark", "methods/index", "methods/kif", "comparison"):
            page.goto(f"file://{tmp_path}/{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        page.set_viewport_size({"width": 1280, "height": 800})
        page.locator("input[name=query]").click()
        page.locator("input[name=query]").press_sequentially("orthogonality")
        page.locator(".md-search-result__item a").first.wait_for()
        assert problems == []
        browser.close()
