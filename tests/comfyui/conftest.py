"""One parameter, ``comfyui``: every ComfyUI that is found. Without one this folder is skipped, in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .comfy import Server, comfyuis, make_base, run_beside, run_inside

NONE = "no ComfyUI found: set COMFYUI_PATH, or put a checkout at ../ComfyUI"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without a ComfyUI, one test stands for all of them, so that one line says that they were skipped."""
    name = collection_path.name
    return True if not comfyuis() and name.startswith("test_") and name != "test_present.py" else None


@pytest.fixture(scope="session", params=comfyuis() or [None], ids=lambda path: "none" if path is None else path.name)
def comfyui(request: pytest.FixtureRequest) -> Path:
    """The folder of a ComfyUI."""
    if request.param is None:
        pytest.skip(NONE)
    return request.param


@pytest.fixture(scope="session")
def base(comfyui: Path, models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with the pack and the tiny checkpoint."""
    return make_base(tmp_path_factory.mktemp(f"base_{comfyui.name}"), models_folder)


@pytest.fixture(scope="session")
def server(comfyui: Path, base: Path) -> Iterator[Server]:
    """A running server."""
    running = Server(comfyui, base)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, comfyui: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the script beside a file of tests leaves in ``result`` when it runs inside the ComfyUI, once for all its tests."""
    return run_beside(str(request.path), comfyui, base, tmp_path_factory.mktemp(request.path.stem))


@pytest.fixture
def inside(comfyui: Path, base: Path, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """``inside(script)``: what a script leaves in ``result`` when it runs inside the ComfyUI."""
    return lambda script: run_inside(comfyui, base, script, tmp_path)
