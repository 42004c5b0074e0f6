"""The training commands explain themselves in plain words."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

from latent_guidance.training.__main__ import COMMANDS, HELP

PLAIN = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}


def shown(*arguments: str) -> str:
    command = [sys.executable, "-m", "latent_guidance.training", *arguments, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=PLAIN).stdout


def test_every_parameter_of_every_command_has_its_help() -> None:
    names = {name for recipe, _ in COMMANDS.values() for name in inspect.signature(recipe).parameters}
    assert names == HELP.keys()


@pytest.mark.parametrize("name", [None, "classifier"])
def test_help_is_plain_text(name: str | None) -> None:
    text = " ".join(shown(*([name] if name else [])).split())
    for markup in ("``", "Args:", "Returns:", "Raises:"):
        assert markup not in text
    if name is None:
        assert all(command in text and words.split(".")[0] in text for command, (_, words) in COMMANDS.items())
    else:
        assert "--by" in text and "What the classes are" in text and "[default: 0.002]" in text
