"""The pack's model folders while a server runs: what is put in is offered after a refresh, what is taken out is not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .comfy import Refused, Server
from .events import watch
from .test_workflows import workflow

LOADERS = ("LGLoadCheckpoint", "LGLoadVAE", "LGLoadTextEncoder", "LGLoadUNet")


def offered(server: Server, node: str) -> list[str]:
    """The choices of a loader's combo, asked for as the editor's Refresh does."""
    inputs = server.json(f"/object_info/{node}")[node]["input"]["required"]
    return next(iter(inputs.values()))[0]


@pytest.fixture
def folders(server: Server) -> Iterator[tuple[Path, Path]]:
    """models/latent_guidance and models/latent_classifiers; what a test puts there goes afterwards."""
    both = server.base / "models" / "latent_guidance", server.base / "models" / "latent_classifiers"
    before = {path for folder in both for path in folder.iterdir()}
    yield both
    for path in {path for folder in both for path in folder.iterdir()} - before:
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def test_a_checkpoint_folder_put_in_while_it_runs_is_offered_and_loads(
    server: Server, folders: tuple[Path, Path]
) -> None:
    checkpoints, _ = folders
    assert all("later" not in offered(server, node) for node in LOADERS)
    shutil.copytree(checkpoints / "tiny", checkpoints / "later")
    assert all("later" in offered(server, node) for node in LOADERS)
    assert "later" in offered(server, "LGLoadClassifier")
    assert server.run(workflow("quickstart", checkpoint="later"))
    shutil.rmtree(checkpoints / "later" / "vae")
    assert "later" not in offered(server, "LGLoadVAE") and "later" in offered(server, "LGLoadUNet")
    shutil.rmtree(checkpoints / "later")
    assert all("later" not in offered(server, node) for node in LOADERS)


def test_a_classifier_put_in_while_it_runs_is_offered_and_loads(server: Server, folders: tuple[Path, Path]) -> None:
    checkpoints, classifiers = folders
    shutil.copytree(checkpoints / "tiny" / "classifier", classifiers / "mine")
    (classifiers / "anime").mkdir()
    shutil.copyfile(next((classifiers / "mine").glob("*.safetensors")), classifiers / "anime" / "style.safetensors")
    assert {"mine", "anime/style.safetensors"} <= set(offered(server, "LGLoadClassifier"))
    prompt = workflow("classifier_guidance", checkpoint="tiny", seed=31)
    [loader] = [node for node in prompt.values() if node["class_type"] == "LGLoadClassifier"]
    for name in ("mine", "anime/style.safetensors"):
        loader["inputs"]["classifier"] = name
        assert watch(server, prompt).end == "execution_success"
    shutil.rmtree(classifiers / "mine")
    assert "mine" not in offered(server, "LGLoadClassifier")
    loader["inputs"]["classifier"] = "mine"
    with pytest.raises(Refused, match="mine"):
        server.run(prompt)


def test_only_safetensors_are_offered(server: Server, folders: tuple[Path, Path]) -> None:
    checkpoints, classifiers = folders
    for name in ("pickled.ckpt", "pickled.pt", "pickled.bin", "read me.txt"):
        (classifiers / name).write_bytes(b"nothing")
        (checkpoints / name).write_bytes(b"nothing")
    (checkpoints / "empty folder").mkdir()
    listed = [name for node in (*LOADERS, "LGLoadClassifier") for name in offered(server, node)]
    assert not [name for name in listed if name.startswith(("pickled", "read me", "empty"))]
    (classifiers / "good.safetensors").write_bytes(b"nothing")
    assert "good.safetensors" in server.json("/models/latent_classifiers")
    assert not [name for name in server.json("/models/latent_classifiers") if name.startswith(("pickled", "read me"))]
