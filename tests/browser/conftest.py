"""A browser on a real ComfyUI's editor. Without a ComfyUI, a Chromium or playwright this folder is skipped, in one line."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _comfy() -> Any:
    """tests/comfyui/comfy.py: finding ComfyUIs and starting their servers."""
    name = "browser_comfy"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "comfyui" / "comfy.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def chromium() -> str | None:
    """Debian's Chromium, or the one that $CHROMIUM names."""
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    return os.environ.get("CHROMIUM") or next((found for name in names if (found := shutil.which(name))), None)


def lacking() -> str:
    """Why the browser tests cannot run, in a line; empty if they can."""
    if not _comfy().comfyuis():
        return "no ComfyUI found for the browser tests: set COMFYUI_PATH, or put a checkout at ../ComfyUI"
    if chromium() is None:
        return "no Chromium found for the browser tests: apt install chromium-headless-shell, or set CHROMIUM"
    if importlib.util.find_spec("playwright") is None:
        return "no playwright found for the browser tests: pip install playwright"
    return ""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where they cannot run, one test stands for all of them, so that one line says that they were skipped."""
    name = collection_path.name
    return True if name.startswith("test_") and name != "test_present.py" and lacking() else None


@pytest.fixture(
    scope="session", params=_comfy().comfyuis() or [None], ids=lambda path: "none" if path is None else path.name
)
def server(
    request: pytest.FixtureRequest, models_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A running ComfyUI with the pack."""
    comfy = _comfy()
    base = comfy.make_base(tmp_path_factory.mktemp(f"base_{request.param.name}"), models_folder)
    running = comfy.Server(request.param, base)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()
