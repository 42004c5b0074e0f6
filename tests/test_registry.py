"""What the ComfyUI registry, ComfyUI-Manager and comfy-cli read: pyproject.toml, requirements.txt, and the README beside them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import latent_guidance

ROOT = Path(__file__).resolve().parent.parent
TESTED = ("0.3.64", "0.33.0")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_version_is_written_down_and_the_library_says_the_same(project: dict[str, Any]) -> None:
    """The registry evaluates nothing: a dynamic version would be missing there."""
    assert "dynamic" not in project["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["version"] == latent_guidance.__version__


def test_name_publisher_and_addresses_are_as_the_registry_wants_them(project: dict[str, Any]) -> None:
    name, comfy, urls = project["project"]["name"], project["tool"]["comfy"], project["project"]["urls"]
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?=[a-z0-9])){0,98}", name) and "comfyui" not in name
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert {"Repository", "Documentation", "Issues"} <= urls.keys()
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert "Operating System :: OS Independent" in project["project"]["classifiers"]
    page = urls["Documentation"].removeprefix(urls["Repository"] + "/blob/main/")
    assert (ROOT / page).is_file()


def test_the_icon_is_in_the_repository_and_small_enough(project: dict[str, Any]) -> None:
    repository = project["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    before = f"https://raw.githubusercontent.com/{repository}/main/"
    icon = project["tool"]["comfy"]["Icon"]
    assert icon.startswith(before) and icon.endswith(".svg")
    picture = ElementTree.parse(ROOT / icon.removeprefix(before)).getroot()
    assert int(picture.attrib["width"]) <= 800 and int(picture.attrib["height"]) <= 400


def test_the_oldest_comfyui_is_one_that_was_tested(project: dict[str, Any]) -> None:
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={TESTED[0]}"
    for page in ("README.md", "README.zh.md"):
        assert all(version in (ROOT / page).read_text("utf-8") for version in TESTED)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_readme_says_how_to_install_by_manager_cli_and_git(page: str, project: dict[str, Any]) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert "ComfyUI-Manager" in text and f"comfy node install {project['project']['name']}" in text
    assert f"git clone {project['project']['urls']['Repository']}" in text


def test_an_install_leaves_torch_alone() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    names = [re.match(r"[\w-]+", line)[0].lower() for line in lines if line]  # type: ignore[index]
    assert names == ["diffusers"]


def test_the_archive_keeps_what_comfyui_needs() -> None:
    left_out = [line.strip("/ ") for line in (ROOT / ".comfyignore").read_text("utf-8").splitlines() if line[:1] != "#"]
    needed = {
        "nodes",
        "latent_guidance",
        "workflows",
        "web",
        "locales",
        "models",
        "docs",
        "requirements.txt",
        "LICENSE",
    }
    assert not needed & set(left_out) and all((ROOT / name).exists() for name in left_out)
