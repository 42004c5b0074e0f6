"""The table over rules: every rule has a row or a reason, rows are measured once, and what is counted is what is computed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latent_guidance.errors import UserError
from latent_guidance.evaluation import rules_page
from latent_guidance.evaluation.__main__ import main
from latent_guidance.evaluation.bench import TINY, Bench
from latent_guidance.evaluation.judge import FILE, judge_fits, judge_settings
from latent_guidance.evaluation.neighbours import Gallery
from latent_guidance.evaluation.rule_rows import BASELINES, ROWS, SAMPLERS_WITHOUT, TASKS, WITHOUT, Row, shown_settings
from latent_guidance.evaluation.rule_shop import Shop
from latent_guidance.evaluation.rules import Extent, at_value, is_of, measure_rules, swept_rows
from latent_guidance.evaluation.rules_page import (
    clearly_better,
    read_rows,
    recommended_settings,
    swept,
    write_rules_page,
)
from latent_guidance.guidance import CFG, RULES, Guider
from latent_guidance.guidance.knobs import default, knobs
from latent_guidance.guidance.recommended import FILE as RECOMMENDED
from latent_guidance.samplers import GO_BY_UNCOND, Recurrence

BY_KEY = {row.key: row for row in ROWS}
EXTENT = Extent(names=2, seeds=2, timed=1)
JUDGED = ("plain-group", "classifier", "mean-shift", "post-step", "log-prob")


class Judge:
    """Sees in every picture the group 0."""

    def verdicts(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pictures), dtype=torch.long)


def judge_file(bench: Bench) -> None:
    (bench.out / FILE).write_bytes(b"judge")
    real = {"real": {"all": 0.75}}
    part = {"settings": judge_settings(bench) | {"steps": 3}, "result": {"final": real, "held_out": real}}
    (bench.out / "judge.json").write_text(json.dumps(part))


def measure(bench: Bench, **changes: Any) -> dict[str, Any]:
    gallery = Gallery(bench.reconstructions)
    return measure_rules(bench, gallery, lambda: Judge(), replace(EXTENT, **changes))  # type: ignore[arg-type, return-value]


def test_every_rule_and_every_sampler_that_guides_has_a_row_or_a_reason_in_words() -> None:
    """A new rule without either fails here: add it to evaluation/rule_rows.py."""
    with_row = {row.rule for row in ROWS if row.rule}
    assert set(RULES) == with_row | set(WITHOUT) and not with_row & set(WITHOUT)
    sampled = {row.sampler for row in ROWS}
    assert sampled >= GO_BY_UNCOND - set(SAMPLERS_WITHOUT) and not sampled & set(SAMPLERS_WITHOUT)
    assert any(row.recurrence > 1 for row in ROWS)
    assert all(len(why) > 20 for why in (*WITHOUT.values(), *SAMPLERS_WITHOUT.values()))


def test_rows_are_measured_with_the_defaults_or_say_why_not() -> None:
    keys = [row.key for row in ROWS] + [at_value(row, value).key for row in ROWS for value in row.values]
    assert len(set(keys)) == len(keys)
    for row in ROWS:
        assert row.task in TASKS and BY_KEY[BASELINES[row.task]].rule is None
        usual = not row.settings and row.recurrence == 1 and row.beside in ((), (CFG(),))
        assert usual or len(row.why) > 20, row.key
        assert not row.values or row.recommended in row.values, row.key
        if row.rule:
            own = knobs(row.rule)
            for name, value in (*row.settings.items(), *((row.knob, value) for value in row.values)):
                if name != "recurrence":
                    own[name].check(value, row.key)
    first = {row.rule: row for row in reversed(ROWS) if row.rule}
    assert [row.key for row in ROWS if row.rule and first[row.rule] is row and row.settings] == [
        "cfg",
        "perp-neg",
        "threshold",
        "noisy-clip",
        "post-step",
    ]


def test_what_tooltips_recommend_is_what_the_rows_were_measured_with() -> None:
    found = json.loads(RECOMMENDED.read_text()) if RECOMMENDED.is_file() else {}
    first = {row.rule.node.id: row for row in reversed(ROWS) if row.rule}
    for node, settings in found.items():
        assert settings == {first[node].knob: first[node].recommended}


@pytest.fixture(scope="module")
def measured_bench(
    tiny_model: Path, squares: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bench, dict[str, Any]]:
    """Every row measured on the tiny model."""
    out = tmp_path_factory.mktemp("rules")
    bench = Bench(tiny_model, squares, out, plan=TINY, device="cpu", batch=2, say=lambda text: None)
    judge_file(bench)
    return bench, measure(bench)


def test_every_row_runs_and_counts_the_passes_that_its_chain_computes(
    measured_bench: tuple[Bench, dict[str, Any]],
) -> None:
    bench, found = measured_bench
    assert set(found) == set(BY_KEY)
    shop = Shop(bench, names=2, seeds=2)
    for key, result in found.items():
        row = BY_KEY[key]
        sets = len(bench.labels) if row.task == "group" else 2
        assert result["pictures"] == 2 * sets and 0 <= result["share"] <= 1 and result["seconds"] > 0
        rules, _ = row.run(shop, shop.asks(row.task)[0])
        guider = Guider(bench.denoiser, rules, uncond=bench.encode([""]))
        levels = Recurrence(row.recurrence).levels(bench.denoiser.process, bench.sigmas)
        computed = guider.passes(bench.sigmas, levels=levels, with_uncond=row.sampler in GO_BY_UNCOND)
        if computed.sparing:
            assert result["passes"] <= computed.total / bench.plan.steps
        else:
            assert result["passes"] == pytest.approx(computed.total / bench.plan.steps), key
    assert found["plain"]["passes"] == 1 and found["cfg"]["passes"] == 2 and found["swg"]["passes"] == 6
    assert found["recurrence"]["passes"] == 4 and found["autoguidance"]["passes"] == 2
    assert {result["share"] for key, result in found.items() if key in JUDGED} == {0.5}, (
        "one group of two is always seen"
    )


def test_rules_differ_from_their_baseline_and_a_sampler_from_another(
    measured_bench: tuple[Bench, dict[str, Any]],
) -> None:
    bench, _ = measured_bench

    def strip(key: str) -> bytes:
        with Image.open(bench.out / "rules" / f"{key}.png") as picture:
            assert picture.size == (64, 64)
            return picture.tobytes()

    strips = {row.key: strip(row.key) for row in ROWS}
    assert strips["plain-picture"] != strips["plain-group"], (
        "the empty prompt with the same seeds, without and with noise"
    )
    for row in ROWS:
        if row.rule and row.key not in ("cfg", "log-prob"):
            assert strips[row.key] != strips[BASELINES[row.task]], row.key


def test_measured_rows_are_kept_and_another_setting_measures_again(
    measured_bench: tuple[Bench, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, found = measured_bench
    said: list[str] = []
    monkeypatch.setattr(bench, "say", said.append)
    assert measure(bench, only=("cfg", "apg")) == {key: found[key] for key in ("cfg", "apg")}
    assert sum("already measured" in line for line in said) == 2
    file = bench.out / "rules" / "apg.json"
    before = file.read_text()
    file.with_suffix(".png").unlink()
    measure(bench, only=("apg",))
    assert "already measured" not in said[-2], "its pictures were lost"
    said.clear()
    measure(bench, only=("apg",), seeds=1)
    assert "already measured" not in "".join(said)
    file.write_text(before)
    with pytest.raises(UserError, match="no row nonsense"):
        measure(bench, only=("nonsense",))
    with pytest.raises(UserError, match="--names"):
        measure(bench, names=25)


def test_what_the_checkpoint_lacks_is_said(
    measured_bench: tuple[Bench, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _ = measured_bench
    monkeypatch.setattr(bench, "checkpoint", replace(bench.checkpoint, noisy_clip=None))
    assert "no noisy-latent CLIP" in measure(bench, only=("noisy-clip",))["noisy-clip"]["missing"]


def test_a_judge_of_these_pictures_is_taken_however_it_was_trained(bench: Bench) -> None:
    assert not judge_fits(bench)
    judge_file(bench)
    assert judge_fits(bench)
    bench.vae_mark = "another"
    assert not judge_fits(bench)


def test_the_page_shows_what_was_measured(measured_bench: tuple[Bench, dict[str, Any]], tmp_path: Path) -> None:
    bench, found = measured_bench
    measure(bench, only=("tangential",), sweep=True)
    docs, settings = tmp_path / "docs", tmp_path / "recommended.json"
    assert write_rules_page(bench.out, docs, settings) == [docs / "rules_table.jpg", docs / "RULES_TABLE.md", settings]
    page = (docs / "RULES_TABLE.md").read_text()
    for row in ROWS:
        assert f"| {row.name} |" in page and row.why in page
    share = found["mpgd"]["loss"] / found["plain-picture"]["loss"]
    assert f"| {share:.3f} |" in next(line for line in page.splitlines() if line.startswith("| MPGD"))
    assert f"| {BY_KEY['tangential'].name} | damping | 0.5 |" in page
    assert "Rectified-CFG++" in page
    assert json.loads(settings.read_text()) == {"LGTangentialCFG": {"damping": 1.0}}, "the others were not swept"
    with Image.open(docs / "rules_table.jpg") as sheet:
        assert sheet.height > 72 * len(ROWS)
    with pytest.raises(UserError, match="without a measured row"):
        read_rows(tmp_path)
    other = json.loads((bench.out / "rules" / "cfg.json").read_text())
    other["settings"]["steps"] = 99
    (tmp_path / "rules").mkdir()
    for name, part in (("cfg", other), ("plain", json.loads((bench.out / "rules" / "plain.json").read_text()))):
        (tmp_path / "rules" / f"{name}.json").write_text(json.dumps(part))
    with pytest.raises(UserError, match="different models, grids, seeds"):
        read_rows(tmp_path)


def test_a_row_that_was_measured_with_another_default_is_refused_by_name(
    measured_bench: tuple[Bench, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row as measured belongs to itself; after a change of a default its number would stand under the wrong value."""
    bench, _ = measured_bench
    files = bench.out / "rules"
    for row in ROWS:
        settings = json.loads((files / f"{row.key}.json").read_text())["settings"]
        assert is_of(row, settings), row.key
        for other in swept_rows(row).values():
            assert other is row or not is_of(other, settings), other.key
    (tmp_path / "rules").mkdir()
    for key in ("apg", "cfg"):
        (tmp_path / "rules" / f"{key}.json").write_text((files / f"{key}.json").read_text())
    left = tmp_path / "rules" / "apg-eta-0.0.json"
    left.write_text("from another default, where the row itself now stands")
    assert list(read_rows(tmp_path)) == ["cfg", "apg"]
    left.unlink()
    changed = [replace(row, settings={"eta": 0.25}) if row.key == "apg" else row for row in ROWS]
    monkeypatch.setattr(rules_page, "ROWS", changed)
    with pytest.raises(UserError, match=r"^apg\.json in .*other settings"):
        read_rows(tmp_path)
    monkeypatch.setattr(
        rules_page, "ROWS", [replace(row, beside=(CFG(),)) if row.key == "apg" else row for row in ROWS]
    )
    with pytest.raises(UserError, match=r"^apg\.json in .*other settings"):
        read_rows(tmp_path)


def test_a_share_is_clearly_better_by_two_standard_errors() -> None:
    assert clearly_better(0.7, 0.5, 100) and not clearly_better(0.6, 0.5, 100) and not clearly_better(0.5, 0.7, 100)
    assert not clearly_better(0.7, 0.5, 20)
    assert not clearly_better(1.0, 1.0, 10)


def test_a_rule_is_recommended_only_when_all_values_of_its_first_row_were_measured() -> None:
    row, later = BY_KEY["apg"], BY_KEY["ddim-cfg-pp"]
    rows: dict[str, Any] = {at_value(row, value).key: {"result": {}} for value in row.values[1:]}
    assert [value for value, _ in swept(row, rows)] == list(row.values[1:]) and recommended_settings(rows) == {}
    rows |= {"apg": {"result": {}}, later.key: {"result": {}}}
    rows |= {at_value(later, value).key: {"result": {}} for value in later.values}
    assert len(swept(later, rows)) == len(later.values)
    assert recommended_settings(rows) == {"LGAdaptiveProjectedGuidance": {"eta": 0.0}}, "not CFG's by CFG++"


def test_settings_are_shown_without_what_is_neutral() -> None:
    assert shown_settings(CFG(guidance_scale=2.5)) == "guidance_scale 2.5"
    assert shown_settings(CFG(guidance_scale=1.0)) == ""
    assert Row(key="x", rule=CFG, knob="guidance_scale").recommended == default(CFG, "guidance_scale")


def test_the_command_measures_and_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, squares: Path
) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    where = ("--model", tiny_model, "--pictures", squares, "--tiny", "--names", 2, "--seeds", 1)
    assert run("rules", tmp_path, *where, "--only", "plain", "--only", "cfg") == 0
    assert "minutes in all" in capsys.readouterr().out
    assert run("rules-report", tmp_path, "--docs", tmp_path) == 0
    assert f"| {BY_KEY['cfg'].name} |" in (tmp_path / rules_page.PAGE).read_text()
    assert run("rules", tmp_path, *where, "--only", "nonsense") == 2
    assert "no row nonsense" in capsys.readouterr().err
