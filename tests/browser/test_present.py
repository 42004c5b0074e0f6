"""Says in one line why the browser tests are skipped."""

from __future__ import annotations

import pytest

from .conftest import lacking


def test_there_is_a_comfyui_and_a_browser() -> None:
    if lacking():
        pytest.skip(lacking())
