"""The table over rules: what each obeys, varies and costs, on one model with the same seeds.

Every row (:mod:`.rule_rows`) is a part of its own in OUT/rules, with its pictures; one that was measured with the same settings is kept,
so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..guidance import CFG, Rule
from ..guidance.knobs import default, knobs
from .bench import Bench
from .curves import point
from .judge import Judge, judge_mark
from .neighbours import RULE, Gallery
from .parts import measured
from .rule_rows import GROUP, PICTURE, ROWS, Row, shown_settings
from .rule_shop import Ask, Shop

FOLDER = "rules"


@dataclass(frozen=True)
class Extent:
    """How much of the table is measured.

    Attributes:
        names: names that are asked for by prompt, text or reference picture.
        seeds: pictures for each of them, and for each group.
        timed: sets of pictures on which a rule is timed, each beside the same set under CFG.
        only: keys of the rows; none for all.
        sweep: the other values of each row's knob too.
        weak: folder of a weaker checkpoint, for autoguidance.
    """

    names: int = 12
    seeds: int = 4
    timed: int = 3
    only: tuple[str, ...] = ()
    sweep: bool = False
    weak: Path | None = None


def chosen_rows(only: Sequence[str]) -> list[Row]:
    """The rows of these keys, all if there are none.

    Raises:
        UserError: a key that no row has.
    """
    known = [row.key for row in ROWS]
    if unknown := sorted(set(only) - set(known)):
        raise UserError(f"no row {', '.join(unknown)}", expected=f"some of {', '.join(known)}", mend="correct --only")
    return [row for row in ROWS if not only or row.key in only]


def at_value(row: Row, value: Any) -> Row:
    """The row with another value of its knob, by the name of its file."""
    key = f"{row.key}-{row.knob}-{value}".replace(" ", "-")
    if row.knob == "recurrence":
        return replace(row, key=key, recurrence=value)
    return replace(row, key=key, settings={**row.settings, row.knob: value})


def swept_rows(row: Row) -> dict[Any, Row]:
    """Value -> row for every value of the row's knob; at the recommended one the row itself."""
    return {value: row if value == row.recommended else at_value(row, value) for value in row.values}


def measure_rules(bench: Bench, gallery: Gallery, judge: Callable[[], Judge], extent: Extent) -> dict[str, Any]:
    """Measure the rows that were not measured with these settings; returns the results by key.

    Args:
        bench: Where samples come from; its batch holds a set of pictures.
        gallery: What nearest pictures are looked for in.
        judge: Gives the judge, when the first row that is about groups asks.
        extent: How much.

    Raises:
        UserError: an unknown row, or counts that do not fit.
    """
    shop = Shop(bench, names=extent.names, seeds=extent.seeds, weak=extent.weak)
    found: dict[str, Any] = {}
    for row in chosen_rows(extent.only):
        found[row.key] = _measured_row(shop, gallery, judge, row, timed=extent.timed)
        others = [varied for varied in swept_rows(row).values() if varied is not row] if extent.sweep else []
        for varied in others:
            found[varied.key] = _measured_row(shop, gallery, judge, varied, timed=0)
    return found


def _measured_row(shop: Shop, gallery: Gallery, judge: Callable[[], Judge], row: Row, *, timed: int) -> dict[str, Any]:
    bench, out = shop.bench, shop.bench.out / FOLDER
    if lacking := shop.lacks(row.needs):
        bench.say(f"{row.key}: not measured, {lacking}")
        return {"missing": lacking}
    judging = judge() if row.task == GROUP else None
    asks = shop.asks(row.task)
    settings = bench.settings(
        sampler=row.sampler.__name__, recurrence=row.recurrence, rules=_described(shop, row, asks[0]),
        asks=[[ask.prompt, ask.index, *ask.seeds] for ask in asks], timed=timed, rule=RULE,
        judge=judge_mark(bench.out) if judging else "", weak=shop.weak_mark if row.key.startswith("autoguidance") else "",
    )  # fmt: skip
    result = measured(
        out, row.key, settings, lambda: _run_row(shop, gallery, judging, row, asks, timed=timed), say=bench.say,
        whole=lambda result: (out / f"{row.key}.png").is_file(),
    )  # fmt: skip
    loss = f", loss {result['loss']:.4g}" if result["loss"] is not None else ""
    bench.say(f"{row.key}: share {result['share']:.3f}, diversity {result['diversity']:.3f}{loss}")
    return result


def _described(shop: Shop, row: Row, ask: Ask) -> list[dict[str, Any]]:
    """The chain as JSON values: what is not connected but set."""
    rule = row.own(shop, ask)
    return [_plain(type(r), vars(r)) for r in [*row.beside, *([rule] if rule else [])]]


def _plain(rule: type[Rule], values: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's name and those of its knobs that are numbers, texts or switches; what ``values`` lacks is the default."""
    whole = {name: values.get(name, default(rule, name)) for name in knobs(rule)}
    kept = {name: value for name, value in whole.items() if type(value) in (int, float, str, bool)}
    return {"rule": rule.__name__, **kept}


def is_of(row: Row, settings: Mapping[str, Any]) -> bool:
    """Whether a part's ``settings`` are what the row now is: its sampler, its recurrence, and its rules with their knobs.

    A label is a connection that each set of pictures makes anew, and is left out.
    """
    rules = [_plain(type(rule), vars(rule)) for rule in row.beside] + (
        [_plain(row.rule, row.settings)] if row.rule else []
    )
    now = (row.sampler.__name__, row.recurrence, _without_label(rules))
    return (settings["sampler"], settings["recurrence"], _without_label(settings["rules"])) == now


def _without_label(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in rule.items() if name != "label"} for rule in rules]


def _run_row(
    shop: Shop, gallery: Gallery, judge: Judge | None, row: Row, asks: Sequence[Ask], *, timed: int
) -> dict[str, Any]:
    bench = shop.bench
    sets: list[Tensor] = []
    losses: list[Tensor] = []
    seconds: list[float] = []
    by_cfg: list[float] = []
    passes = 0
    for ask in asks:
        rules, sampler = row.run(shop, ask)
        prompts = [ask.prompt] * len(ask.seeds)
        clock = ask.number < timed
        if clock:
            bench.encode([ask.name, ""])
            told = [ask.name] * len(ask.seeds)
            start = _now(bench.device)
            bench.decoded(bench.latents(told, ask.seeds, [CFG()]))
            by_cfg.append((_now(bench.device) - start) / len(told))
        with shop.counting() as calls:
            start = _now(bench.device)
            latents = bench.latents(prompts, ask.seeds, rules, sampler=sampler)
            sets.append(bench.decoded(latents))
            if clock:
                seconds.append((_now(bench.device) - start) / len(prompts))
        passes += sum(calls)
        if row.task == PICTURE:
            losses.append(shop.reference(ask)(latents / bench.checkpoint.vae.scaling_factor))
    pictures, wanted = torch.cat(sets), torch.tensor([ask.index for ask in asks for _ in ask.seeds])
    if judge is not None:
        right = (judge.verdicts(pictures) == wanted).float()
    else:
        right = gallery.is_named(gallery.nearest(pictures)[1], wanted).float()
    _save_strip(bench.out / FOLDER / f"{row.key}.png", sets)
    measures = point(bench, gallery, 0.0, right, sets)
    own = row.own(shop, asks[0])
    cost = {"seconds": statistics.median(seconds), "cfg_seconds": statistics.median(by_cfg)} if timed else {}
    return {
        **{name: measures[name] for name in ("share", "diversity", "distance")},
        "pictures": len(pictures),
        "loss": float(torch.cat(losses).mean()) if losses else None,
        "passes": passes / len(pictures) / bench.plan.steps,
        **cost,
        "setting": shown_settings(own) if own else "",
        "beside": " + ".join(f"{type(rule).__name__} ({shown_settings(rule)})" for rule in row.beside),
        "asked": [ask.name for ask in asks],
    }


def _now(device: torch.device) -> float:
    """Seconds: of the processor that this program had, or on another device of the clock when it has come to rest."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _save_strip(path: Path, sets: Sequence[Tensor]) -> None:
    """Every picture as it is, without labels: a column per set, a row per seed."""
    from PIL import Image

    columns = torch.cat([torch.cat(list(pictures), dim=1) for pictures in sets], dim=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    Image.fromarray(columns.movedim(0, -1).numpy()).save(partial)
    os.replace(partial, path)
