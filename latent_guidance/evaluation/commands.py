"""The commands of ``python -m latent_guidance.evaluation``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch

from ..errors import UserError
from ..models.checkpoint import emoji_folder
from ..training.emoji import default_data_folder
from .bench import TINY, Bench, Plan
from .curves import measure_curves
from .judge import FILE, Judge, judge_fits, load_judge, measure_judge
from .neighbours import Gallery
from .parts import Say
from .prompting import measure_captions, measure_prompts
from .rules import Extent, measure_rules
from .sheets import measure_pages
from .steering import measure_classes

Measure = Callable[["Session"], Any]


class Session:
    """One bench and what several parts share, made when first asked for."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._gallery: Gallery | None = None
        self._judge: tuple[Judge, dict[str, Any]] | None = None

    @property
    def gallery(self) -> Gallery:
        """The training set's reconstructions."""
        if self._gallery is None:
            self._gallery = Gallery(self.bench.reconstructions, self.bench.device)
        return self._gallery

    @property
    def judge(self) -> tuple[Judge, dict[str, Any]]:
        """The judge, trained if it is not there yet, and its accuracy on the real pictures."""
        if self._judge is None:
            result = measure_judge(self.bench)
            self._judge = self._loaded(), result["final"]["real"]
        return self._judge

    @property
    def judge_at_hand(self) -> Judge:
        """The judge that is there for these pictures, however it was trained; trained as planned if there is none."""
        return self._loaded() if judge_fits(self.bench) else self.judge[0]

    def _loaded(self) -> Judge:
        judge, labels = load_judge(self.bench.out / FILE, self.bench.device)
        if labels != self.bench.labels:
            raise UserError(
                f"a judge of {', '.join(labels)}", expected=", ".join(self.bench.labels), mend="train it again"
            )
        return judge


def _judge(session: Session) -> None:
    _ = session.judge


def _classes(session: Session) -> None:
    judge, on_real = session.judge
    measure_classes(session.bench, judge, on_real)


def _prompts(session: Session) -> None:
    measure_prompts(session.bench, session.gallery)


def _captions(session: Session) -> None:
    measure_captions(session.bench, session.gallery)


def _curves(session: Session) -> None:
    measure_curves(session.bench, session.judge[0], session.gallery)


def _pages(session: Session) -> None:
    measure_pages(session.bench)


PARTS: dict[str, tuple[Measure, str]] = {
    "judge": (_judge, "Train the classifier of clean pictures that judges, and state how well it does."),
    "classes": (_classes, "Steer to each group with the classifier and have the samples judged."),
    "prompts": (_prompts, "Draw known names and see whether the nearest training picture is the named one."),
    "captions": (_captions, "Draw captions that no training picture has, on one page."),
    "curves": (_curves, "Share as asked, diversity and distance to the training set over the guidance scale."),
    "pages": (_pages, "Pages of a hundred samples each: unguided, per group, per name, at several seeds."),
}
"""Every part by its command, in the order in which `all` measures them: what is needed most comes first."""


def measure(parts: Sequence[Measure], out: Path, *, plan: Plan, say: Say, **where: Any) -> float:
    """Measure parts; returns the minutes it took.

    Args:
        parts: What is done with the session, in order.
        out: Folder of the results; what is there already with the same settings is kept.
        plan: What to measure.
        say: Told what happens.
        **where: ``model``, ``pictures`` (None for the usual places), ``device`` and ``batch``.

    Raises:
        UserError: The model or the pictures are missing or do not fit.
    """
    start = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # pictures as on the CPU
    model = where.pop("model") or emoji_folder()
    if model is None:
        raise UserError("models/emoji was not found", expected="a checkpoint folder", mend="give --model")
    pictures = where.pop("pictures") or default_data_folder()
    out.mkdir(parents=True, exist_ok=True)
    session = Session(Bench(Path(model), Path(pictures), out, plan=plan, say=say, **where))
    for part in parts:
        part(session)
    return (time.perf_counter() - start) / 60


HELP = {
    "out": "The folder of the results; what it holds that was measured with the same settings is kept.",
    "model": "The checkpoint folder; by default the bundled emoji model.",
    "pictures": "The folder of pictures, with 128/ and 160/ in it; by default where the emoji are drawn.",
    "device": "cpu or cuda.",
    "batch": "Samples at a time.",
    "steps": "Steps of the sampler.",
    "seed": "The first seed.",
    "classifier_scale": "guidance_scale of Classifier Guidance.",
    "classifier_scaling": "Its scaling: relative, raw or entropy.",
    "cfg_scale": "guidance_scale of classifier-free guidance.",
    "judge_steps": "Updates of the judge.",
    "judge_batch": "Pictures in each of them.",
    "judge_size": "Side in pixels of what the judge sees.",
    "curve_per_group": "Samples for each group at each point of a curve.",
    "curve_names": "Names at each point of the curve of classifier-free guidance.",
    "curve_seeds": "Seeds for each of them.",
    "names": "Names that are asked for.",
    "seeds": "Pictures for each name and group.",
    "only": "A row's key, to measure it alone; may be given several times.",
    "sweep": "Measure the other values of each row's knob too.",
    "weak": "A weaker checkpoint folder for Autoguidance; by default the model with noise on its weights.",
    "tiny": "So few samples and steps that everything runs through in a minute; the numbers mean nothing.",
}
"""Option -> its help."""


def _described(options: dict[str, Any]) -> dict[str, Any]:
    """The annotations of a command: each option's type, with its help."""
    import typer

    described: dict[str, Any] = {
        name: Annotated[kind, (typer.Argument if name == "out" else typer.Option)(help=HELP[name])]
        for name, kind in options.items()
    }
    return {**described, "return": None}


def command(names: tuple[str, ...]) -> Callable[..., None]:
    """The function behind a command that measures the parts ``names``; its arguments are the command's options."""
    import typer

    def run(
        out: Path,
        model: Path | None = None,
        pictures: Path | None = None,
        device: str = "cpu",
        batch: int = 256,
        steps: int = Plan.steps,
        seed: int = Plan.seed,
        classifier_scale: float = Plan.classifier_scale,
        classifier_scaling: str = Plan.classifier_scaling,
        cfg_scale: float = Plan.cfg_scale,
        judge_steps: int = Plan.judge_steps,
        judge_batch: int = Plan.judge_batch,
        judge_size: int = Plan.judge_size,
        curve_per_group: int = Plan.curve_per_group,
        curve_names: int = Plan.curve_names,
        curve_seeds: int = Plan.curve_seeds,
        tiny: bool = False,
    ) -> None:
        plan = replace(
            Plan(), steps=steps, judge_steps=judge_steps, judge_batch=judge_batch, judge_size=judge_size,
            curve_per_group=curve_per_group, curve_names=curve_names, curve_seeds=curve_seeds,
        )  # fmt: skip
        if tiny and plan != Plan():
            raise UserError(
                "--tiny beside other counts", expected="one of the two", mend="leave --tiny out, or the counts"
            )
        plan = TINY if tiny else plan
        plan = replace(
            plan,
            seed=seed,
            classifier_scale=classifier_scale,
            classifier_scaling=classifier_scaling,
            cfg_scale=cfg_scale,
        )
        minutes = measure(
            [PARTS[name][0] for name in names], out, plan=plan, say=typer.echo, model=model, pictures=pictures,
            device=device, batch=batch,
        )  # fmt: skip
        typer.echo(f"{minutes:.1f} minutes in all")

    run.__annotations__ = _described({
        "out": Path, "model": Path | None, "pictures": Path | None, "device": str, "batch": int, "steps": int, "seed": int,
        "classifier_scale": float, "classifier_scaling": str, "cfg_scale": float, "judge_steps": int, "judge_batch": int, "judge_size": int,
        "curve_per_group": int, "curve_names": int, "curve_seeds": int, "tiny": bool,
    })  # fmt: skip
    return run


RULES_HELP = "Measure every guidance rule: obedience, diversity, network passes and time beside CFG. Rows that are there are kept."
RULES_REPORT_HELP = (
    "Write DOCS/RULES_TABLE.md and DOCS/rules_table.jpg from the rows in OUT; with --recommended "
    "latent_guidance/guidance/recommended.json also the settings that tooltips show."
)


def rules_command() -> Callable[..., None]:
    """The function behind the command that measures the table over rules."""
    import typer

    def run(
        out: Path,
        model: Path | None = None,
        pictures: Path | None = None,
        device: str = "cpu",
        steps: int = 25,
        seed: int = Plan.seed,
        names: int = Extent.names,
        seeds: int = Extent.seeds,
        only: list[str] = [],  # noqa: B006 - typer reads it and never changes it
        sweep: bool = False,
        weak: Path | None = None,
        tiny: bool = False,
    ) -> None:
        plan = replace(TINY if tiny else replace(Plan(), steps=steps), seed=seed)
        extent = Extent(names=names, seeds=seeds, only=tuple(only), sweep=sweep, weak=weak)

        def part(session: Session) -> None:
            measure_rules(session.bench, session.gallery, lambda: session.judge_at_hand, extent)

        minutes = measure(
            [part], out, plan=plan, say=typer.echo, model=model, pictures=pictures, device=device, batch=seeds
        )
        typer.echo(f"{minutes:.1f} minutes in all")

    run.__annotations__ = _described({
        "out": Path, "model": Path | None, "pictures": Path | None, "device": str, "steps": int, "seed": int, "names": int,
        "seeds": int, "only": list[str], "sweep": bool, "weak": Path | None, "tiny": bool,
    })  # fmt: skip
    return run
