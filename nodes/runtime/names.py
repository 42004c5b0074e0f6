"""Finding checkpoint folders, classifiers and noisy-latent CLIPs by the names that combo boxes show. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ...latent_guidance.errors import UserError
from ...latent_guidance.models.checkpoint import checkpoint_folders
from ...latent_guidance.models.files import refuse_pickle
from ...latent_guidance.models.picture_clip import CONFIG, WEIGHTS
from .base import Kind

BUNDLED = Path(__file__).resolve().parents[2] / "models"
"""The pack's own models: found where they are, without copying."""

_COMPONENTS: dict[Kind, str] = {"vae": "vae", "text_encoder": "text_encoder", "unet": "unet"}
_LOADERS: dict[Kind, str] = {
    "checkpoint": "checkpoint folder",
    "vae": "checkpoint folder with a VAE",
    "text_encoder": "checkpoint folder with a text encoder",
    "unet": "checkpoint folder with a UNet",
    "classifier": "noisy-latent classifier",
    "noisy_clip": "noisy-latent CLIP",
    "picture_clip": "CLIP on pictures (an open_clip folder)",
}
_INSIDE: dict[Kind, str] = {"classifier": "classifier", "noisy_clip": "clip"}
"""How the folders of networks on noisy latents begin, inside a checkpoint folder."""
OWN_FOLDERS: dict[Kind, str] = {"classifier": "latent_classifiers", "noisy_clip": "latent_clips"}
"""The folder of models/ in which such networks lie by themselves."""
CLIP_VISION = "clip_vision"
"""ComfyUI's own folder of models/ for CLIPs that look at pictures; open_clip folders lie there too."""


def _folders(root: Path) -> list[Path]:
    """The folders in ``root``, by name; hidden ones and what cannot be read are left out."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _on_noisy_latents(part: str, roots: Iterable[Path], own_roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for name, folder in checkpoint_folders(roots).items():
        for inner in _folders(folder):
            if inner.name.startswith(part) and (inner / "config.json").is_file():
                yield (name if inner.name == part else f"{name}/{inner.name}"), inner
    for root in own_roots:
        for folder in _folders(root):
            if (folder / "config.json").is_file():
                yield folder.name, folder
        if root.is_dir():
            for file in sorted(root.rglob("*.safetensors")):
                if not (file.parent / "config.json").is_file():
                    yield file.relative_to(root).as_posix(), file


def _open_clips(roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for root in roots:
        for config in sorted(root.rglob(CONFIG)) if root.is_dir() else ():
            inner = config.parent.relative_to(root).as_posix()
            yield (WEIGHTS[0] if inner == "." else inner), config.parent


def find(kind: Kind, roots: Iterable[Path], own_roots: Iterable[Path] = ()) -> dict[str, Path]:
    """Name -> folder or file of everything of ``kind``, in the order of the roots; of equal names the first counts.

    Args:
        kind: what to look for.
        roots: folders that hold checkpoint folders.
        own_roots: folders that hold networks on noisy latents: folders, or files that carry their own description. For CLIPs on
            pictures: folders that hold open_clip folders, at any depth.
    """
    if kind == "picture_clip":
        found = list(_open_clips(own_roots))
    elif kind in _INSIDE:
        found = list(_on_noisy_latents(_INSIDE[kind], list(roots), own_roots))
    elif kind == "checkpoint":
        found = list(checkpoint_folders(roots).items())
    else:
        part = _COMPONENTS[kind]
        found = [
            (name, path / part)
            for name, path in checkpoint_folders(roots).items()
            if (path / part / "config.json").is_file()
        ]
    listed: dict[str, Path] = {}
    for name, path in found:
        listed.setdefault(name, path)
    return listed


def locate(kind: Kind, name: str, found: dict[str, Path]) -> Path:
    """Where ``name`` is.

    Raises:
        UserError: it is not among those found, or pickled.
    """
    if name not in found:
        refuse_pickle(Path(name))
        own = f"models/{OWN_FOLDERS[kind]}, or a checkpoint folder's {_INSIDE[kind]}/" if kind in _INSIDE else ""
        own = f"models/{CLIP_VISION} ({CONFIG} and {WEIGHTS[0]})" if kind == "picture_clip" else own
        raise UserError(
            f"a {_LOADERS[kind]} called {name!r}, which is not there",
            expected="one of " + (", ".join(found) or "those found, and none was found"),
            mend=f"choose another name, or put it into {own or 'models/latent_guidance'} and refresh",
        )
    return found[name]
