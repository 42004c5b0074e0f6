"""The measured parts as a page of Markdown. Every number in it is read from the parts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .drawing import NAMED, TITLES, choices, draw_curves
from .parts import read_part
from .steering import WANTED

PICTURE, CAPTIONS, PAGE = "emoji_curves.png", "emoji_captions.jpg", "EMOJI.md"


def write_report(out: Path, docs: Path) -> list[Path]:
    """Write ``docs``/emoji_curves.png, ``docs``/emoji_captions.jpg and ``docs``/EMOJI.md from the parts in ``out``; returns their paths.

    Raises:
        UserError: A part was not measured, or with another model, other pictures or another seed than the curves.
    """
    parts = {name: read_part(out, name) for name in ("judge", "classes", "prompts", "captions", "curves")}
    results = {name: part["result"] for name, part in parts.items()}
    settings = parts["curves"]["settings"]
    for name, part in parts.items():
        for what in ("model", "pictures", "seed"):
            if what in part["settings"] and part["settings"][what] != settings.get(what):
                raise UserError(
                    f"{out / name}.json was measured with {what} {part['settings'][what]}, curves.json with {settings.get(what)}",
                    expected="parts of one and the same model, pictures and seeds",
                    mend=f"measure {name} again",
                )
    draw_curves(results["curves"], results["classes"]["wanted"], docs / PICTURE)
    sections = [
        _head(settings),
        _judge(results["judge"], parts["judge"]["settings"]),
        _classes(results["classes"], parts["classes"]["settings"], results["judge"]["held_out"]["real"]["by_group"]),
        _prompts(results["prompts"], parts["prompts"]["settings"]),
        _curves(results["curves"], results["classes"]["wanted"]),
        _captions(results["captions"], parts["captions"]["settings"], results["judge"]["final"]["real"]["pictures"]),
    ]
    _copy_page(out / results["captions"]["page"], docs / CAPTIONS)
    path = docs / PAGE
    partial = path.with_name(f".partial.{path.name}")
    partial.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return [docs / PICTURE, docs / CAPTIONS, path]


def _copy_page(page: Path, to: Path) -> None:
    """A page of samples as JPEG, under a temporary name first."""
    from PIL import Image

    partial = to.with_name(f".partial.{to.name}")
    with Image.open(page) as picture:
        picture.convert("RGB").save(partial, quality=85)
    os.replace(partial, to)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers with a decimal point get three decimals, and pipes are escaped."""

    def cell(value: object) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows])


def _head(settings: dict[str, Any]) -> str:
    return f"""# The bundled emoji model, measured

Measured by `python -m latent_guidance.evaluation all` (how many samples and steps, each part says), written by
`python -m latent_guidance.evaluation report`; nothing is typed by hand.
Samples: DPM-Solver++(2M), from the empty prompt its form for the SDE (DPM++ 2M SDE),
{settings["steps"]} steps on the {settings["grid"]} grid,
one seed per sample (from {settings["seed"]}), fp32.
Model `{settings["model"]}` (SHA-256 of its files, first twelve digits)."""


def _judge(result: dict[str, Any], settings: dict[str, Any]) -> str:
    held, final = result["held_out"], result["final"]
    rows = [
        ("trained without a tenth", f"held-out, {held[kind]['pictures']}", kind, held[kind]["all"], held[kind]["mean_of_groups"])
        for kind in ("real", "reconstructions")
    ] + [
        ("trained on all (the judge)", f"all, {final[kind]['pictures']}", kind, final[kind]["all"], final[kind]["mean_of_groups"])
        for kind in ("real", "reconstructions")
    ]  # fmt: skip
    return f"""## The judge

A classifier of clean pictures ({result["parameters"] / 1e6:.1f} M parameters) trained for this alone: pixels, not latents; no weights or
features shared with the classifier that steers; {settings["steps"]} steps of {settings["batch"]} pictures, {settings["size"]} pixels wide.
Reconstructions are real pictures through the VAE and back.

{table(("judge", "pictures", "kind", "right", "mean of groups"), rows)}"""


def _classes(result: dict[str, Any], settings: dict[str, Any], held_out: dict[str, float | None]) -> str:
    base = result["unguided"]
    rows = [
        (label, group["as_asked"], group["judge_on_real"], "" if held_out[label] is None else held_out[label], group["wanted"],
         _yes(group["reached"]), base["judged"][label], base["real"][label])
        for label, group in result["groups"].items()
    ]  # fmt: skip
    rows.append(
        ("**mean**", result["mean"], result["judge_on_real"], "", result["wanted"], _yes(result["reached"]), "", "")
    )
    head = (
        "group",
        "judged as asked",
        "judge on real",
        "on held-out",
        f"{WANTED:g} × on real",
        "reached",
        "unguided, judged",
        "of the data",
    )
    return f"""## Steering by class

Empty prompt, classifier guidance at scale {settings["classifier_scale"]:g} ({settings["classifier_scaling"]}),
{result["per_group"]} samples per group.
The last two columns: how {base["pictures"]} unguided samples are judged, and the groups' shares of the training pictures
(total variation distance {base["total_variation"]:.3f}).

{table(head, rows)}"""


def _prompts(result: dict[str, Any], settings: dict[str, Any]) -> str:
    count, failures = result["names"], result["failures"]
    rows = [(f["name"], f["nearest"], f["distance"], f["to_named"], f["rank"]) for f in failures]
    merged = "; ".join(", ".join(names) for names in result["merged"]) or "none"
    listed = table(("name", "nearest picture", "distance", "distance to the named", "rank of the named"), rows)
    return f"""## Known names

{count} names, one sample each, classifier-free guidance at {settings["cfg_scale"]:g}:
of **{result["named"]:.3f}** the nearest reconstruction of the training set is the named picture
({result["named_without_merging"]:.3f} without merging).
Near-duplicates: {result["rule"]}; here {merged}.
Mean distance to the nearest: {result["mean_distance"]:.3f}; of a real picture to its nearest other: {result["real_to_nearest_other"]:.3f}.

<details><summary>The {len(failures)} failures</summary>

{listed}

</details>"""


def _curves(result: dict[str, Any], wanted: float) -> str:
    samples, real = result["samples"], result["real"]
    recommended, tables, chosen = [], [], choices(result, wanted)
    for kind, title in TITLES.items():
        choice = chosen[kind]
        recommended.append((title, f"{choice['scale']:g}", choice["share"], choice["diversity"], choice["distance"]))
        rows = [(f"{p['scale']:g}", p["share"], p["diversity"], p["distance"]) for p in result[kind]]
        tables.append(f"### {title}\n\n" + table(("scale", "share", "diversity", "distance"), rows))
    names = samples["names"] * samples["per_name"]
    failing = [TITLES[kind] for kind in ("raw", "relative") if max(p["share"] for p in result[kind]) < wanted]
    short = f" (so with {' and '.join(failing)})" if failing else ""
    joined = "\n\n".join(tables)
    return f"""## Over the scale

![share as asked, diversity and distance to the training set over the guidance scale]({PICTURE})

Share: judged as asked ({samples["groups"]} samples a point), or for classifier-free guidance nearest to the named picture
({names} samples a point: {samples["names"]} names, {samples["per_name"]} seeds).
Diversity: mean distance of two samples of one group or name; of the real pictures of a group {real["diversity"]:.3f}.
Distance: to the nearest reconstruction;
of a real picture to its nearest other {real["nearest_other"]:.3f}. All distances are root mean
squares over pixels at 64 x 64, values from 0 to 1. The same seeds at every scale; the first scale is the neutral one.

Recommended: the smallest scale that guides and whose share, less its standard error, reaches {wanted:.3f} (0.9 of the judge's accuracy on
real pictures), or {NAMED:g} of the names; where none does, the one with the largest share{short}. Where the neutral scale reaches it
too, the model knows its names without guidance, and the smallest scale that guides says little; other words may want more.

{table(("guidance", "recommended scale", "share", "diversity", "distance"), recommended)}

<details><summary>All points</summary>

{joined}

</details>"""


def _captions(result: dict[str, Any], settings: dict[str, Any], pictures: int) -> str:
    rows = [
        (row["caption"], ", ".join(f"{d:.3f}" for d in row["distances"]), ", ".join(dict.fromkeys(row["nearest"])))
        for row in result["captions"]
    ]
    return f"""## Captions that no training picture has

{len(rows)} captions, {settings["seeds"]} seeds each, classifier-free guidance at {settings["cfg_scale"]:g}.
Mean distance to the nearest training picture {result["mean_distance"]:.3f};
of a real picture to its nearest other {result["real_to_nearest_other"]:.3f}.
Nothing measures how well they are met: look. A small model that has seen {pictures} pictures puts known colours and faces on known
shapes at best; otherwise it draws something that it knows, or a shape that is neither.

![the captions]({CAPTIONS})

<details><summary>Each caption</summary>

{table(("caption", "distances", "nearest training pictures"), rows)}

</details>"""


def _yes(value: bool) -> str:
    return "yes" if value else "no"
