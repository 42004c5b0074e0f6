"""The emoji folder, from the three Debian packages where they are installed; their absence is said either way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image

from latent_guidance.errors import UserError
from latent_guidance.training import emoji
from latent_guidance.training.annotations import read_annotations

needs_packages = pytest.mark.skipif(
    not (emoji.FONT_FILE.is_file() and emoji.NAMES_FILE.is_file()),
    reason="fonts-noto-color-emoji or unicode-data is not installed",
)
NAMES = """# Version: 15.0
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # \U0001f600 E1.0 grinning face
263A  ; unqualified # x E0.6 smiling face
# group: People & Body
# subgroup: hand-fingers-open
1F44B ; fully-qualified # \U0001f44b E0.6 waving hand
1F44B 1F3FB ; fully-qualified # x E1.0 waving hand: light skin tone
# group: Component
# subgroup: skin-tone
1F3FB ; component # x E1.0 light skin tone
# group: Flags
# subgroup: country-flag
1F1E9 1F1EA ; fully-qualified # \U0001f1e9\U0001f1ea E0.6 flag: Germany
#EOF
"""


def _names(tmp_path: Path, text: str = NAMES) -> Path:
    path = tmp_path / "emoji-test.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_names_without_skin_tones_and_components(tmp_path: Path) -> None:
    found = emoji.read_names(_names(tmp_path))
    assert [(e.name, e.group, e.subgroup) for e in found] == [
        ("grinning face", "Smileys & Emotion", "face-smiling"),
        ("waving hand", "People & Body", "hand-fingers-open"),
        ("flag: Germany", "Flags", "country-flag"),
    ]
    assert found[2].file_name == "Flags/1f1e9-1f1ea.png"


def test_missing_packages_and_other_versions_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unicode-data"):
        emoji.read_names(tmp_path / "absent.txt")
    with pytest.raises(UserError, match=r"emoji version 12\.0.*version 15\.0"):
        emoji.read_names(_names(tmp_path, NAMES.replace("15.0", "12.0")))
    with pytest.raises(UserError, match="cut short after 3 emoji"):
        emoji.read_names(_names(tmp_path, NAMES.replace("#EOF", "")))
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        emoji.open_font(tmp_path / "absent.ttf")
    (tmp_path / "other.ttf").write_bytes(bytes(64))
    with pytest.raises(UserError, match="not a TrueType font"):
        emoji.open_font(tmp_path / "other.ttf")
    table = (1).to_bytes(2, "big") + bytes(6) + b"head" + bytes(4) + (28).to_bytes(4, "big") + bytes(4)
    (tmp_path / "old.ttf").write_bytes(bytes(4) + table + bytes(4) + (3 * 65536).to_bytes(4, "big"))
    with pytest.raises(UserError, match=r"revision 3\.000.*revision 2\.042"):
        emoji.open_font(tmp_path / "old.ttf")


def _annotations(tmp_path: Path) -> Path:
    folder = tmp_path / "cldr"
    words = {"en": ("face | grin | grinning face", "grinning face"), "zh": ("笑脸 | 脸", "嘿嘿")}
    for language, (keywords, name) in words.items():
        for part in ("annotations", "annotationsDerived"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            entries = f'<annotation cp="😀">{keywords}</annotation><annotation cp="😀" type="tts">{name}</annotation>'
            xml = f"<ldml><annotations>{entries if part == 'annotations' else ''}</annotations></ldml>"
            (folder / part / f"{language}.xml").write_text(xml, encoding="utf-8")
    return folder


def test_other_words_for_an_emoji(tmp_path: Path) -> None:
    folder = _annotations(tmp_path)
    names = emoji.read_names(_names(tmp_path))
    lines = [json.loads(line) for line in emoji.metadata_lines(names, folder).splitlines()]
    assert lines[0]["keywords"] == ["face", "grin"] and lines[0]["other_texts"] == ["嘿嘿", "😀"]
    assert lines[1]["keywords"] == [] and lines[1]["other_texts"] == ["👋"]  # an emoji newer than this CLDR
    with pytest.raises(UserError, match=r"de\.xml.*unicode-cldr-core"):
        read_annotations("de", folder)
    (folder / "annotations" / "zh.xml").write_text("<ldml>")
    with pytest.raises(UserError, match="no XML file"):
        read_annotations("zh", folder)


@needs_packages
def test_all_names_are_1870_in_nine_groups() -> None:
    found = emoji.read_names()
    assert len(found) == 1870 and len({e.file_name for e in found}) == 1870
    assert tuple(dict.fromkeys(e.group for e in found)) == emoji.LABELS


@needs_packages
def test_folder_is_made_resumed_and_completed(tmp_path: Path) -> None:
    names, words = _names(tmp_path), _annotations(tmp_path)

    def make() -> Path:
        return emoji.make_emoji_folder(
            tmp_path / "out", sizes=(32,), names_path=names, annotations_folder=words, progress=False
        )

    folder = make()
    lines = [json.loads(line) for line in (folder / "32" / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["grinning face", "waving hand", "flag: Germany"]
    flag = folder / "32" / "Flags" / "1f1e9-1f1ea.png"
    with Image.open(flag) as picture:
        assert picture.size == (32, 32) and picture.mode == "RGB"
        small = picture.resize((1, 3), Image.Resampling.BOX, box=(8, 6, 24, 25))
        black, red, gold = (numpy.asarray(small)[row, 0] for row in range(3))
    assert max(black) < 110 and red[0] > 150 > red[2] and gold[0] > 180 and gold[2] < 130
    before = flag.stat().st_mtime_ns
    assert make() == folder
    assert flag.stat().st_mtime_ns == before
    (folder / "32" / "metadata.jsonl").write_text("{}\n")  # of another version
    make()
    assert flag.stat().st_mtime_ns != before
    flag.unlink()
    assert emoji.missing_files(folder / "32", emoji.read_names(names)) == ["Flags/1f1e9-1f1ea.png"]
    make()
    assert flag.is_file()
    own = folder / "32" / "holiday.png"
    own.write_bytes(b"somebody's own")
    flag.unlink()
    with pytest.raises(UserError, match=r"holds 1 files that are no emoji of ours, such as 'holiday\.png'"):
        make()
    assert own.read_bytes() == b"somebody's own"


@needs_packages
def test_joined_sequences_are_one_glyph_and_unknown_ones_are_refused() -> None:
    font = emoji.open_font()
    family = emoji.Emoji("\U0001f468\u200d\U0001f469\u200d\U0001f467", "family", "People & Body", "family")
    assert emoji.draw(font, family, 64).size == (64, 64)
    two = emoji.Emoji("\U0001f600\U0001f600", "two faces", "Smileys & Emotion", "face-smiling")
    with pytest.raises(UserError, match="two faces"):
        emoji.draw(font, two, 64)
