"""The table over rules as a page of Markdown, with a labelled sheet of pictures. Every number is read from the rows' files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.files import write_json
from .neighbours import RULE
from .parts import read_part
from .report import table
from .rule_rows import BASELINES, GROUP, PICTURE, PROMPT, ROWS, SAMPLERS_WITHOUT, TASKS, TEXT, WITHOUT, Row
from .rules import FOLDER, is_of, swept_rows
from .rules_sheet import save_rules_sheet

PICTURES, PAGE = "rules_table.jpg", "RULES_TABLE.md"

HEADINGS = {
    PROMPT: "By prompt",
    TEXT: "By a text that the rule alone is told",
    GROUP: "By group",
    PICTURE: "By a reference picture",
}
OBEYED = {PROMPT: "as named", TEXT: "as named", GROUP: "judged as asked", PICTURE: "as the reference"}


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Every measured row of ``out``, swept values among them, by key: {"settings": ..., "result": ...}.

    Raises:
        UserError: there is none, rows were measured on different models, steps or seeds, or one was measured with other settings of its
            rules than it now has.
    """
    known = {each.key: each for row in ROWS for each in (row, *swept_rows(row).values())}
    rows = {key: read_part(out / FOLDER, key) for key in known if (out / FOLDER / f"{key}.json").is_file()}
    if not rows:
        raise UserError(
            f"{out / FOLDER} without a measured row",
            expected="what `rules` wrote",
            mend=f"run `python -m latent_guidance.evaluation rules {out}` first",
        )
    common = {
        json.dumps([row["settings"][name] for name in ("model", "steps", "grid", "seed")]) for row in rows.values()
    }
    counts = {(key, row["result"]["pictures"], row["settings"]["asks"][0][1]) for key, row in rows.items()}
    by_task = {(known[key].task, *rest) for key, *rest in counts}
    if len(common) > 1 or len(by_task) > len({task for task, *_ in by_task}):
        raise UserError(
            f"rows in {out / FOLDER} that were measured on different models, grids, seeds or numbers of pictures",
            expected="all of them with the same",
            mend="run `rules` again with one set of options: it measures what differs",
        )
    if old := [key for key, part in rows.items() if not is_of(known[key], part["settings"])]:
        raise UserError(
            f"{', '.join(f'{key}.json' for key in old)} in {out / FOLDER}, measured with other settings than the table's rows now have",
            expected="every row measured with the sampler, the rules and the knobs that it now has",
            mend="run `rules` again, with --sweep if values of knobs are among them: it measures what differs",
        )
    return rows


def write_rules_page(out: Path, docs: Path, recommended: Path | None = None) -> list[Path]:
    """Write ``docs``/RULES_TABLE.md and ``docs``/rules_table.jpg from the rows in ``out``; returns the paths of what was written.

    Args:
        out: what `rules` wrote to.
        docs: folder of the page.
        recommended: JSON file for :func:`recommended_settings`, which tooltips read; None writes none.

    Raises:
        UserError: no row was measured, or they do not belong together.
    """
    rows = read_rows(out)
    save_rules_sheet(docs / PICTURES, out / FOLDER, {key: row["result"] for key, row in rows.items()})
    sections = [_head(rows, out), *(_task_section(task, rows) for task in TASKS), _without(rows), _sweeps(rows)]
    path = docs / PAGE
    partial = path.with_name(f".partial.{path.name}")
    partial.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    os.replace(partial, path)
    if recommended is None:
        return [docs / PICTURES, path]
    write_json(recommended, recommended_settings(rows))
    return [docs / PICTURES, path, recommended]


def _head(rows: dict[str, Any], out: Path) -> str:
    first = next(iter(rows.values()))
    settings = first["settings"]
    judge = ""
    if any(row["settings"]["judge"] for row in rows.values()):
        found = read_part(out, "judge")["result"]
        judge = f"""
*Judged as asked*: by a classifier of clean pictures trained for this alone, which is right on {found["final"]["real"]["all"]:.3f} of the
real pictures, and trained without a tenth of them on {found["held_out"]["real"]["all"]:.3f} of that tenth."""
    timed = [row["result"]["cfg_seconds"] for row in rows.values() if "cfg_seconds" in row["result"]]
    seconds = f" One picture under CFG took {min(timed):.2f} to {max(timed):.2f} s." if timed else ""
    return f"""# Guidance rules on the bundled emoji model

Measured by `python -m latent_guidance.evaluation rules`, written by `python -m latent_guidance.evaluation rules-report`; nothing is typed
by hand. Where no other sampler is named, DPM-Solver++(2M), by group its form for the SDE (DPM++ 2M SDE);
{settings["steps"]} steps on the {settings["grid"]} grid, fp32, seeds from
{settings["seed"]}, the same for every rule. Model `{settings["model"]}` (SHA-256 of its files, first twelve digits).

![one row per rule, the same prompts and seeds in the columns]({PICTURES})

*As named*, *as the reference*: the nearest reconstruction of the training set is the picture asked for; {RULE}.{judge}
*Diversity*: mean distance of two pictures of one name or group. *Distance*: to the nearest reconstruction. Both are root mean squares over
the pixels at 64 x 64, values from 0 to 1. *Passes*: calls of the diffusion model for one picture, divided by the steps, as counted; what
goes back through it is not counted. *Time*: of one picture, divided by that of CFG measured in turns with it (medians; on the CPU
processor time).{seconds}
The share of n pictures has a standard error of up to 0.5 / sqrt(n).

Rules are measured with the defaults of their knobs, which are the recommended settings, unless the table gives a reason."""


def _task_section(task: str, rows: dict[str, Any]) -> str:
    mine = [row for row in ROWS if row.task == task and row.key in rows]
    if not mine:
        return ""
    by_loss = task == PICTURE
    base = rows.get(BASELINES[task])
    lines, notes = [], []
    for row in mine:
        result = rows[row.key]["result"]
        cells: list[object] = [row.name, result["setting"], result["beside"], result["share"]]
        if by_loss:
            cells.append(result["loss"] / base["result"]["loss"] if base else "")
        cells += [result["diversity"], result["distance"], f"{result['passes']:.2f}", _relative(result)]
        lines.append(cells)
        if row.why:
            notes.append(f"- {row.name}: {row.why}.")
    first = rows[mine[0].key]["result"]
    loss = ("loss, of unguided",) if by_loss else ()
    head = ("rule", "setting", "beside", OBEYED[task], *loss, "diversity", "distance", "passes", "time, CFG = 1")
    each = "group" if task == GROUP else "name" if task in (PROMPT, TEXT) else "reference picture"
    asked = first["asked"]
    listed = f"{len(asked)} of them" if task == GROUP else ", ".join(asked)
    text = f"""## {HEADINGS[task]}

{first["pictures"]} pictures a row, {first["pictures"] // len(asked)} for each {each}: {listed}.

{table(head, lines)}"""
    return text + ("\n\n" + "\n".join(notes) if notes else "")


def _relative(result: dict[str, Any]) -> str:
    return f"{result['seconds'] / result['cfg_seconds']:.2f}" if "seconds" in result else ""


def _without(rows: dict[str, Any]) -> str:
    lines = [f"- {rule.node.name}: {why}." for rule, why in WITHOUT.items()]
    lines += [f"- {why}." for why in SAMPLERS_WITHOUT.values()]
    lines += [f"- {row.name}: not measured here." for row in ROWS if row.key not in rows]
    return "## Without a row\n\n" + "\n".join(lines) if lines else ""


def swept(row: Row, rows: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """(value, result) of every value of the row's knob that was measured, the recommended one among them, in the row's order."""
    return [(value, rows[each.key]["result"]) for value, each in swept_rows(row).items() if each.key in rows]


def clearly_better(share: float, than: float, pictures: int) -> bool:
    """Whether a share of so many pictures is above another by more than two standard errors of their difference."""
    mean = (share + than) / 2
    return share - than > 2 * math.sqrt(2 * mean * (1 - mean) / pictures)


def recommended_settings(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Knob -> value by node id, for every rule whose knob was measured at all its values, by the first of its rows."""
    first = {row.rule: row for row in reversed(ROWS) if row.rule}
    whole = [
        row
        for row in ROWS
        if row.rule and first[row.rule] is row and row.values and len(swept(row, rows)) == len(row.values)
    ]
    return {row.rule.node.id: {row.knob: row.recommended} for row in whole if row.rule}


def _sweeps(rows: dict[str, Any]) -> str:
    lines = []
    for row in ROWS:
        points = swept(row, rows)
        if len(points) < 2:
            continue
        own = next((result for value, result in points if value == row.recommended), None)
        for value, result in points:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            better = own is not None and clearly_better(result["share"], own["share"], result["pictures"])
            mark = "recommended" if value == row.recommended else "clearly more as asked" if better else ""
            loss = f"{result['loss']:.4g}" if result["loss"] is not None else ""
            lines.append(
                (row.name, row.knob, shown, result["share"], result["diversity"], result["distance"], loss, mark)
            )
    if not lines:
        return ""
    head = ("rule", "knob", "value", "as asked", "diversity", "distance", "loss", "")
    return f"""## What the recommended settings were taken against

*Clearly*: by more than two standard errors of the difference of two shares.

{table(head, lines)}"""
