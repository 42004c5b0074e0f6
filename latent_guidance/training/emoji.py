"""The emoji pictures: an image folder drawn from three Debian packages.

``fonts-noto-color-emoji`` holds the drawings (bitmaps of 136 x 128), ``unicode-data`` the names, the nine groups and
the subgroups (``emoji-test.txt``), ``unicode-cldr-core`` keywords and the Chinese names. Every fully-qualified emoji
without a skin tone is drawn once per size on white.
The result follows the Hugging Face imagefolder convention::

    DIR/128/metadata.jsonl                    one line per picture: file_name, text, group, subgroup, keywords, other_texts
    DIR/128/Smileys & Emotion/1f600.png       128 x 128, RGB
    DIR/160/...                               the same at 160 x 160, for random crops

so the folder names are class labels and ``text`` is the caption; ``other_texts`` holds the Chinese name and the emoji
itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .annotations import ANNOTATIONS_FOLDER, read_annotations

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES_FILE = Path("/usr/share/unicode/emoji/emoji-test.txt")
FONT_REVISION = "2.042"
"""The font the bundled model was made from; another revision draws other pictures."""
EMOJI_VERSION = "15.0"
GLYPH_SIZE = (136, 128)
GLYPH_POINTS = 109
"""The one size at which the font's bitmaps are stored."""
SIZES = (128, 160)
LABELS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
"""The groups of emoji-test.txt without "Component" (skin tones and hair)."""

_LINE = re.compile(r"^([0-9A-F ]+?)\s*;\s*fully-qualified\s*#\s*\S+\s+E[\d.]+\s+(.+)$")
_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))


@dataclass(frozen=True)
class Emoji:
    """One entry of emoji-test.txt: its characters, its name, its group and its subgroup."""

    characters: str
    name: str
    group: str
    subgroup: str

    @property
    def file_name(self) -> str:
        """Path inside a size's folder: group, then code points in hexadecimal."""
        return f"{self.group}/{'-'.join(f'{ord(c):x}' for c in self.characters)}.png"


def default_data_folder() -> Path:
    """``$LATENT_GUIDANCE_DATA``, or ``~/.cache/latent_guidance``, with ``emoji`` below it."""
    root = os.environ.get("LATENT_GUIDANCE_DATA")
    return (Path(root) if root else Path.home() / ".cache" / "latent_guidance") / "emoji"


def read_names(path: Path = NAMES_FILE) -> list[Emoji]:
    """Read the fully-qualified emoji without skin tones, in the file's order.

    Raises:
        UserError: The file is missing, cut short, or is not the emoji-test.txt of Unicode emoji 15.0.
    """
    if not path.is_file():
        raise UserError(
            f"The list of emoji names was not found at {path}",
            expected="emoji-test.txt of Debian's package unicode-data",
            mend="run `apt-get install unicode-data`, or give the path of an emoji-test.txt",
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    version = re.search(r"^# Version: (\S+)", text, re.MULTILINE)
    if version is None or version[1] != EMOJI_VERSION:
        raise UserError(
            f"{path} holds emoji version {version[1] if version else 'unknown'}",
            expected=f"version {EMOJI_VERSION}, which names the bundled model's emoji",
            mend="install Debian 12's unicode-data (15.0.0)",
        )
    found: list[Emoji] = []
    group = subgroup = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif (match := _LINE.match(line)) and group in LABELS:
            characters = "".join(chr(int(code, 16)) for code in match[1].split())
            if not _SKIN_TONES.intersection(map(ord, characters)):
                found.append(Emoji(characters, match[2].strip(), group, subgroup))
    if not text.rstrip().endswith("#EOF"):
        raise UserError(
            f"{path} is cut short after {len(found)} emoji: its last line is not #EOF",
            expected="the whole emoji-test.txt",
            mend="install Debian 12's unicode-data (15.0.0) again",
        )
    return found


def open_font(path: Path = FONT_FILE) -> FreeTypeFont:
    """Open the font at its only size, with text shaping (flags and joined families are single glyphs).

    Raises:
        UserError: The font is missing or of another revision, or Pillow cannot shape text.
    """
    from PIL import ImageFont, features

    if not path.is_file():
        raise UserError(
            f"The emoji font was not found at {path}",
            expected="NotoColorEmoji.ttf of Debian's package fonts-noto-color-emoji",
            mend="run `apt-get install fonts-noto-color-emoji`, or give the path of a NotoColorEmoji.ttf",
        )
    revision = font_revision(path)
    if revision != FONT_REVISION:
        raise UserError(
            f"{path} is revision {revision} of the font",
            expected=f"revision {FONT_REVISION}, whose drawings the bundled model was made from",
            mend="install Debian 12's fonts-noto-color-emoji (2.042)",
        )
    if not features.check("raqm"):
        raise UserError(
            "This Pillow was built without Raqm",
            expected="Raqm, which joins the characters of flags and families into one glyph",
            mend="install Pillow's wheel from PyPI: `pip install --force-reinstall pillow`",
        )
    return ImageFont.truetype(str(path), GLYPH_POINTS, layout_engine=ImageFont.Layout.RAQM)


def font_revision(path: Path) -> str:
    """The ``fontRevision`` of a TrueType file's ``head`` table, such as "2.042".

    Raises:
        UserError: The file is not a TrueType font.
    """
    data = path.read_bytes()
    count = int.from_bytes(data[4:6], "big")
    for entry in range(12, 12 + 16 * count, 16):
        if data[entry : entry + 4] == b"head":
            offset = int.from_bytes(data[entry + 8 : entry + 12], "big")
            return f"{int.from_bytes(data[offset + 4 : offset + 8], 'big') / 65536:.3f}"
    raise UserError(
        f"{path} is not a TrueType font: it has no 'head' table",
        expected="NotoColorEmoji.ttf",
        mend="give the path of that font",
    )


def draw(font: FreeTypeFont, emoji: Emoji, size: int) -> Image:
    """Draw one emoji on white, centred, ``size`` x ``size`` pixels RGB; the glyph's 136 pixels fill the width.

    Raises:
        UserError: The font lacks the emoji, or draws it as several glyphs.
    """
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(emoji.characters)
    drawn = (round(right - left), round(bottom - top))
    if drawn != GLYPH_SIZE:
        raise UserError(
            f"The font draws {emoji.name!r} in {drawn[0]} x {drawn[1]} pixels",
            expected=f"one glyph of {GLYPH_SIZE[0]} x {GLYPH_SIZE[1]}; the font and emoji-test.txt do not match",
            mend="install Debian 12's fonts-noto-color-emoji and unicode-data",
        )
    side = max(GLYPH_SIZE)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    layer = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    corner = ((side - drawn[0]) // 2 - left, (side - drawn[1]) // 2 - top)
    ImageDraw.Draw(layer).text(corner, emoji.characters, font=font, embedded_color=True)
    canvas.alpha_composite(layer)
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def make_emoji_folder(
    folder: Path | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    font_path: Path = FONT_FILE,
    names_path: Path = NAMES_FILE,
    annotations_folder: Path = ANNOTATIONS_FOLDER,
    progress: bool = True,
) -> Path:
    """Draw all emoji into ``folder`` (default :func:`default_data_folder`) and return it.

    A size that is complete is left alone; an incomplete one is drawn again, and nothing else is deleted for it. Each size is drawn
    under a temporary name and renamed when whole.

    Raises:
        UserError: ``folder`` holds other files where the pictures go, or a package is missing or of another version (see
            :func:`read_names`, :func:`open_font`, :func:`.annotations.read_annotations`).
    """
    from tqdm import tqdm

    folder = default_data_folder() if folder is None else Path(folder)
    emojis = read_names(names_path)
    font = open_font(font_path)
    lines = metadata_lines(emojis, annotations_folder)
    for size in sizes:
        target = folder / str(size)
        if not missing_files(target, emojis) and (target / "metadata.jsonl").read_bytes() == lines.encode():
            continue
        _refuse_others(target, emojis)
        partial = folder / f".{size}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for group in LABELS:
            (partial / group).mkdir(parents=True)
        for emoji in tqdm(emojis, desc=f"drawing {size}x{size}", disable=not progress):
            draw(font, emoji, size).save(partial / emoji.file_name)
        (partial / "metadata.jsonl").write_text(lines, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return folder


def _refuse_others(target: Path, emojis: Sequence[Emoji]) -> None:
    """Refuse to draw where somebody's own files are."""
    ours = {"metadata.jsonl", *(emoji.file_name for emoji in emojis)}
    found = (path for path in target.rglob("*") if not path.is_dir())
    others = sorted(name for path in found if (name := path.relative_to(target).as_posix()) not in ours)
    if others:
        raise UserError(
            f"{target} holds {len(others)} files that are no emoji of ours, such as {others[0]!r}",
            expected="an empty or a new folder, or one that this command made",
            mend="give another folder, or move these files away",
        )


def metadata_lines(emojis: Sequence[Emoji], annotations_folder: Path = ANNOTATIONS_FOLDER) -> str:
    """The content of ``metadata.jsonl``.

    Raises:
        UserError: The annotations are missing.
    """
    english, chinese = (read_annotations(language, annotations_folder) for language in ("en", "zh"))
    lines = [
        {
            "file_name": emoji.file_name,
            "text": emoji.name,
            "group": emoji.group,
            "subgroup": emoji.subgroup,
            "keywords": [word for word in english.keywords_of(emoji.characters) if word != emoji.name],
            "other_texts": [text for text in (chinese.name(emoji.characters), emoji.characters) if text],
        }
        for emoji in emojis
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def missing_files(folder: Path, emojis: Sequence[Emoji]) -> list[str]:
    """Names of the files that a size's folder lacks; ``metadata.jsonl`` counts."""
    wanted: Iterator[str] = (emoji.file_name for emoji in emojis)
    return [name for name in ("metadata.jsonl", *wanted) if not (folder / name).is_file()]
