"""A browser, a hub with two branches, and the page with a desk that needs no model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_folders

SHOTS = Path(__file__).parents[3] / "artifacts" / "ui"  # kept by CI
REPOSITORY = "me/tiny-GPTQ"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, without a window."""
    pytest.importorskip("gradio", reason="the web UI's extra is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("QUANTMILL_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shelf_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_folders.Hub]:
    """A hub that holds two branches."""
    made = hub_folders.repository_folder(tmp_path_factory.mktemp("made") / "two")
    running = hub_folders.Hub.start(tmp_path_factory.mktemp("hub") / "root")
    env = running.environment(tmp_path_factory.mktemp("publisher"))
    words = (sys.executable, "-m", "quantmill.cli", "publish", made, REPOSITORY)
    done = hub_folders.run(*words, env=env)
    assert done.returncode == 0, done.stderr
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tiny_branch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised folder, for what the page reads of it."""
    folder = tmp_path_factory.mktemp("branch") / "main"
    hub_folders.branch_folder(folder, hub_folders.CONFIGS["main"])
    return folder


@pytest.fixture
def serve_page(shelf_hub: hub_folders.Hub, tiny_branch: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """serve_page(pace) -> the page's address; its files lie under tmp_path, so a second one remembers."""
    processes = []

    def start(pace: float = 0.0) -> str:
        env = shelf_hub.environment(tmp_path / "hf", QUANTMILL_HOME=str(tmp_path / "home"))
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("desks.py")), str(tiny_branch), str(pace)],
            env={**env, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """visit(address) opens a page of a laptop's size; a picture of its end is kept."""
    pages: list[Any] = []

    def open_page(address: str, width: int = 1280, height: int = 860, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        page.set_default_timeout(90_000)
        page.goto(address)
        page.get_by_role("tab", name="Model").wait_for()
        pages.append(page)
        return page

    yield open_page
    SHOTS.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(pages):
        page.screenshot(path=str(SHOTS / f"{request.node.name}-{number}.png"))
        page.context.close()
