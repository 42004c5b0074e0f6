"""Image folders with captions: ``metadata.jsonl`` with ``file_name`` and ``text``, folder names as class labels."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class ImageFolder:
    """Pictures in memory.

    Attributes:
        images: (N, 3, H, W) uint8.
        texts: N captions.
        classes: (N,) int64 indices into ``labels``.
        labels: Class names: the folders that hold the pictures, in order of appearance.
        subgroups: N finer class names; empty strings where the metadata has none.
        keywords: For each picture, words that describe it; empty where the metadata has none.
        other_texts: For each picture, other captions, such as one in another language; likewise.
    """

    images: Tensor
    texts: tuple[str, ...]
    classes: Tensor
    labels: tuple[str, ...]
    subgroups: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]
    other_texts: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def mark(self) -> str:
        """What tells these pictures, in this order, from others: their shape, and of their SHA-256 twelve hexadecimal digits."""
        return f"{tuple(self.images.shape)} {hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()[:12]}"

    @property
    def words_mark(self) -> str:
        """Likewise of captions, classes and other words."""
        words = (self.texts, self.classes.tolist(), self.labels, self.subgroups, self.keywords, self.other_texts)
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]


def load_image_folder(folder: Path) -> ImageFolder:
    """Read an image folder into memory.

    Args:
        folder: Holds ``metadata.jsonl`` and one folder per class; all pictures of one size.

    Raises:
        UserError: The folder or its metadata is missing, a line of it is no entry, a named picture is missing, cannot be read or is of
            another size.
    """
    import numpy as np
    from PIL import Image

    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(
            f"No pictures to train on: {metadata} was not found",
            expected="an image folder with metadata.jsonl (file_name and text per line)",
            mend="give such a folder; `python -m latent_guidance.training emoji` makes the emoji one",
        )
    lines = [
        _entry(metadata, number, line)
        for number, line in enumerate(metadata.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if line.strip()
    ]
    missing = [line["file_name"] for line in lines if not (folder / line["file_name"]).is_file()]
    if not lines:
        raise UserError(
            f"{metadata} names no pictures",
            expected="a line for each picture",
            mend="make the folder again",
        )
    if missing:
        raise UserError(
            f"{folder} is incomplete: {len(missing)} of {len(lines)} pictures named in metadata.jsonl are missing, "
            f"the first is {missing[0]!r}",
            expected="every picture that metadata.jsonl names",
            mend="make the folder again",
        )
    pictures = []
    for line in lines:
        try:
            with Image.open(folder / line["file_name"]) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # cut short, damaged, too large
            raise UserError(
                f"{folder / line['file_name']} cannot be read as a picture: {error}",
                expected="a whole picture file",
                mend="put the picture back, or delete it and make the folder again",
            ) from error
    shapes = {p.shape for p in pictures}
    if len(shapes) > 1:
        raise UserError(
            f"{folder} holds pictures of several sizes, such as {sorted(shapes)[:3]}",
            expected="pictures of one size",
            mend="scale them to one size",
        )
    labels = tuple(dict.fromkeys(str(Path(line["file_name"]).parent) for line in lines))
    return ImageFolder(
        images=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        texts=tuple(line["text"] for line in lines),
        classes=torch.tensor([labels.index(str(Path(line["file_name"]).parent)) for line in lines]),
        labels=labels,
        subgroups=tuple(line.get("subgroup", "") for line in lines),
        keywords=tuple(tuple(line.get("keywords", ())) for line in lines),
        other_texts=tuple(tuple(line.get("other_texts", ())) for line in lines),
    )


def _entry(metadata: Path, number: int, line: str) -> dict[str, Any]:
    """One line of ``metadata``, whose file lies inside its folder."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("file_name", "text")):
        place = Path(entry["file_name"])
        inside = not place.is_absolute() and ".." not in place.parts and max(map(len, place.parts), default=999) < 256
        words = all(_are_texts(entry.get(key, [])) for key in ("keywords", "other_texts"))
        if inside and words and isinstance(entry.get("subgroup", ""), str):
            return entry
    raise UserError(
        f"line {number} of {metadata} is {line[:80]!r}",
        expected='an object with the texts "file_name" (inside the folder) and "text"; "subgroup", if there is one, a text, and '
        '"keywords" and "other_texts" lists of texts',
        mend="write the line again, or make the folder again",
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def to_signed(images: Tensor) -> Tensor:
    """uint8 pictures [0, 255] -> float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def random_crops(images: Tensor, *, size: int, generator: torch.Generator) -> Tensor:
    """A random ``size`` x ``size`` window of each picture: (B, C, H, W) -> (B, C, size, size), any dtype."""
    height, width = images.shape[-2:]
    count = images.shape[0]
    tops = torch.randint(0, height - size + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(0, width - size + 1, (count,), generator=generator).tolist()
    windows = zip(images, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + size, left : left + size] for image, top, left in windows])
