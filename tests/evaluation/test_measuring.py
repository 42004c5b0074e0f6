"""The command line from end to end on a tiny model: every part is written, kept, and turned into a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latent_guidance.errors import UserError
from latent_guidance.evaluation import steering
from latent_guidance.evaluation.__main__ import main
from latent_guidance.evaluation.bench import Bench
from latent_guidance.evaluation.commands import HELP, PARTS
from latent_guidance.evaluation.drawing import recommended
from latent_guidance.evaluation.judge import FILE
from latent_guidance.evaluation.neighbours import Gallery
from latent_guidance.evaluation.parts import fingerprint, measured
from latent_guidance.evaluation.prompting import measure_captions, measure_prompts
from latent_guidance.evaluation.report import table


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_all_parts_are_measured_once_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, squares: Path
) -> None:
    out = tmp_path / "out"
    where = ("--model", tiny_model, "--pictures", squares, "--tiny", "--batch", 8)
    assert run(monkeypatch, "all", out, *where) == 0
    assert "minutes in all" in capsys.readouterr().out
    parts = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS}
    assert (out / FILE).is_file() and not list(out.rglob(".*partial*"))
    files = parts["pages"]["result"]["files"]
    assert len(files) == 1 + 2 + 1
    for file in [*files, "captions.png"]:
        with Image.open(out / file) as sheet:
            assert sheet.height > 100 and sum(count > 0 for count in sheet.convert("L").histogram()) > 20
    assert [point["scale"] for point in parts["curves"]["result"]["cfg"]] == [1, 4]
    raw, relative = (parts["curves"]["result"][kind][0] for kind in ("raw", "relative"))
    assert raw == relative, "both are unguided at their neutral scale"

    assert run(monkeypatch, "all", out, *where) == 0
    said = capsys.readouterr().out
    assert said.count("already measured") == len(PARTS)
    points = sorted(path.name for path in (out / "curves").glob("*.json"))
    assert points == ["cfg-1.json", "cfg-4.json", "raw-0.json", "raw-5.json", "relative-0.3.json", "relative-0.json"]
    whole = (out / "curves.json").read_text()
    for path in (out / "curves.json", out / "curves" / "raw-5.json"):  # as if stopped on the way
        path.unlink()
    assert run(monkeypatch, "curves", out, *where) == 0
    said = capsys.readouterr().out
    assert said.count("already measured") == len(points) - 1 + said.count("judge: already measured")
    assert json.loads((out / "curves.json").read_text())["result"] == json.loads(whole)["result"]
    assert run(monkeypatch, "classes", out, *where, "--classifier-scale", 7) == 0
    assert "already measured" not in capsys.readouterr().out.replace("judge: already measured", "")
    assert json.loads((out / "classes.json").read_text())["settings"]["classifier_scale"] == 7

    assert run(monkeypatch, "report", out, "--docs", tmp_path / "docs") == 0
    page = (tmp_path / "docs" / "EMOJI.md").read_text()
    share = parts["prompts"]["result"]["named"]
    assert f"**{share:.3f}**" in page and "| reds |" in page and "blue apple" in page
    with Image.open(tmp_path / "docs" / "emoji_captions.jpg") as captions:
        assert captions.width > 100
    with Image.open(tmp_path / "docs" / "emoji_curves.png") as plot:
        assert plot.width > 1000

    curves = out / "curves.json"
    former = json.loads(whole)
    curves.write_text(json.dumps({**former, "settings": {**former["settings"], "model": "another"}}))
    assert run(monkeypatch, "report", out, "--docs", tmp_path / "docs") == 2
    assert "classes.json was measured with model" in capsys.readouterr().err
    for damaged in ("[]", '{"settings": {}}', "[" * 100_000, "{"):
        curves.write_text(damaged)
        assert run(monkeypatch, "report", out, "--docs", tmp_path / "docs") == 2
        assert "curves.json is not readable" in capsys.readouterr().err
    assert (tmp_path / "docs" / "EMOJI.md").read_text() == page


def test_options_are_checked_and_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for wrong in (
        ("--judge-steps", 0), ("--judge-steps", -4), ("--judge-size", 3), ("--judge-batch", 0), ("--curve-names", -1),
        ("--curve-seeds", 1), ("--curve-per-group", 0), ("--steps", 0),
    ):  # fmt: skip
        assert run(monkeypatch, "judge", tmp_path, *wrong) == 2
        name = str(wrong[0])[2:].replace("-", "_")
        assert f"{name} = {wrong[1]}. Expected: at least" in capsys.readouterr().err
    assert run(monkeypatch, "curves", tmp_path, "--tiny", "--steps", 4) == 2
    assert "--tiny beside other counts" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, "judge", tmp_path / "file" / "out", "--model", tmp_path, "--pictures", tmp_path) == 2
    assert "could not be read or written" in capsys.readouterr().err
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("all", "rules"):
        assert run(monkeypatch, name, "--help") == 0
        text = capsys.readouterr().out
        lines = [line for line in text.splitlines() if "--" in line and "--help" not in line]
        assert len(lines) > 8 and all(len(line.split(">")[-1].strip(" │")) > 8 for line in lines)
    assert all(help.endswith(".") for help in HELP.values())


def test_bad_input_ends_with_status_2_and_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    assert run(monkeypatch, "prompts", tmp_path, "--model", tiny_model, "--pictures", tmp_path / "none") == 2
    assert "metadata.jsonl was not found" in capsys.readouterr().err
    assert run(monkeypatch, "report", tmp_path, "--docs", tmp_path) == 2
    assert "judge.json was not found" in capsys.readouterr().err


def test_a_part_is_measured_again_when_a_setting_or_its_file_changed(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"n": len(calls)}

    def part(settings: dict[str, Any], whole: bool = True) -> int:
        return measured(tmp_path, "part", settings, measure, say=lambda text: None, whole=lambda result: whole)["n"]

    assert part({"a": (1, 2)}) == 1
    assert part({"a": [1, 2]}) == 1
    assert part({"a": [1, 3]}) == 2
    assert part({"a": [1, 3]}, whole=False) == 3
    (tmp_path / "part.json").write_text("{")
    assert part({"a": [1, 3]}) == 4


def test_a_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    first = fingerprint(tmp_path)
    (tmp_path / "notes.md").write_text("no part of it")
    assert fingerprint(tmp_path) == first
    (tmp_path / "a.safetensors").write_bytes(b"two")
    assert fingerprint(tmp_path) != first
    with pytest.raises(UserError, match="was not found"):
        fingerprint(tmp_path / "none")


def test_prompts_that_come_out_as_named_are_counted_and_others_listed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that knows every picture but the last of the draw, which it takes for another one."""
    gallery = Gallery(bench.reconstructions)
    chosen = bench.names(4)
    wrong = next(i for i in range(24) if gallery.component[i] != gallery.component[chosen[3]])
    drawn = bench.reconstructions[[*chosen[:3], wrong]]
    monkeypatch.setattr(bench, "by_prompt", lambda prompts, seeds: drawn)
    result = measure_prompts(bench, gallery)
    assert result["named"] == 0.75
    (failure,) = result["failures"]
    assert failure["name"] == bench.data.texts[chosen[3]]
    assert gallery.component[bench.data.texts.index(failure["nearest"])] == gallery.component[wrong]
    assert failure["distance"] == pytest.approx(0, abs=1e-3) and failure["rank"] > 1
    assert any({"red square 0", "red square 2"} <= set(names) for names in result["merged"])


def test_a_caption_that_a_picture_has_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latent_guidance.evaluation.prompting.UNSEEN", ("red square 4",))
    with pytest.raises(UserError, match="red square 4"):
        measure_captions(bench, Gallery(bench.reconstructions))


def test_samples_are_judged_against_the_group_that_was_asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives red pictures whatever is asked, and a judge that tells red from blue."""

    class Judge:
        def verdicts(self, pictures: torch.Tensor) -> torch.Tensor:
            return (pictures.float().mean((2, 3))[:, 2] > 128).long()

    def red(*arguments: Any, **rest: Any) -> torch.Tensor:
        return torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 32, 32)

    monkeypatch.setattr(bench, "by_classifier", red)
    monkeypatch.setattr(bench, "from_nothing", lambda seeds: red().repeat(2, 1, 1, 1))
    (bench.out / FILE).write_bytes(b"judge")
    on_real = {"mean_of_groups": 0.8, "by_group": {"reds": 1.0, "blues": 0.6}}
    result = steering.measure_classes(bench, Judge(), on_real)  # type: ignore[arg-type]
    assert result["groups"]["reds"]["as_asked"] == 1 and result["groups"]["reds"]["reached"]
    assert result["groups"]["blues"]["as_asked"] == 0 and not result["groups"]["blues"]["reached"]
    assert result["groups"]["blues"]["judged"] == {"reds": 1.0, "blues": 0.0}
    assert result["mean"] == 0.5 and result["wanted"] == pytest.approx(0.72) and not result["reached"]
    assert result["unguided"]["total_variation"] == pytest.approx(0.5)


def test_the_smallest_scale_that_is_sure_to_reach_what_is_wanted_is_recommended() -> None:
    """Of 100 samples, a share of 0.8 has a standard error of 0.04."""

    def chosen(*shares: float, samples: int = 100) -> float:
        points = [{"scale": scale, "share": share} for scale, share in enumerate(shares)]
        return recommended(points, wanted=0.75, samples=samples, neutral=0)["scale"]

    assert chosen(0.1, 0.5, 0.8, 0.9, 0.7) == 2
    assert chosen(0.1, 0.5, 0.78, 0.9, 0.7) == 3 and chosen(0.1, 0.5, 0.78, 0.9, 0.7, samples=10_000) == 2
    assert chosen(0.9, 0.9, 0.95) == 1, "the neutral scale guides nothing"
    assert chosen(0.9, 0.5, 0.6, 0.4) == 2, "none reaches it: the best"


def test_a_table_escapes_what_would_break_it() -> None:
    assert table(("a", "b"), [("x|y", 0.5)]).splitlines()[-1] == "| x\\|y | 0.500 |"
