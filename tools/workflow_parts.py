"""What several example workflows are made of: loaders, a sampling with its decoder, and one column per chain of rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workflow_builder import Node, Output, Workflow

CHECKPOINT = "emoji"
STEPS = 20
SIDE = 128
CLASSIFIER_SCALE, RAW_SCALE, CFG_SCALE = 0.2, 30.0, 1.5
"""The scales that the curves recommend on the emoji model (docs/EMOJI.md): classifier guidance relative, raw; CFG, for known names."""
WORD_SCALE = 4.0
"""CFG where the prompt is no known name: by eye, and the notes say so."""
RAW_STEPS = 30
"""A raw scale goes by the number of steps; this is the curves'."""

Chain = Sequence[tuple[str, dict[str, Any]]]
"""Rules in order: node type, and the settings that are not its defaults."""


def emoji(w: Workflow, at: tuple[float, float]) -> Node:
    """The loader of the bundled checkpoint."""
    return w.node("LGLoadCheckpoint", at, wide=300, checkpoint=CHECKPOINT)


def empty(w: Workflow, at: tuple[float, float], batch: int, side: int = SIDE) -> Node:
    """Empty latents."""
    return w.node("EmptyLatentImage", at, wide=320, width=side, height=side, batch_size=batch)


def sample(
    w: Workflow,
    x: float,
    y: float,
    load: Node,
    guider: Output,
    noise: Output,
    sampler: Output,
    sigmas: Output,
    latent: Output,
) -> Node:
    """SamplerCustomAdvanced and the decoder to the right of it; below the sampler stays room for its preview."""
    run = w.node(
        "SamplerCustomAdvanced", (x, y), noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )
    return w.node("VAEDecode", (x + 310, y), wide=210, samples=run[0], vae=load[2])


@dataclass
class Shared:
    """What every column of a comparison has in common."""

    load: Node
    prompt: Node
    negative: Node
    size: Node
    noise: Node
    sampler: Node | None
    sigmas: Node

    def group(self, w: Workflow, more: Sequence[Node] | None = None) -> None:
        """Frames around the rest and ``more`` of the kind, and around the loader, unless there is more: that has a frame of its own."""
        if more is None:
            w.group("Model", [self.load], color="#8A8")
        rest = [self.prompt, self.negative, self.size, self.noise, self.sampler, self.sigmas, *(more or ())]
        w.group("The same for all", [node for node in rest if node is not None], color="#b58b2a")


def shared(
    w: Workflow,
    load: Node,
    prompt: str,
    *,
    negative: str | None = None,
    batch: int = 4,
    side: int = SIDE,
    seed: int = 1,
    steps: int = STEPS,
    own_samplers: bool = False,
) -> Shared:
    """Prompt, negative (None: the null condition), size, noise, sampler and steps, below one another at x = 370.

    Without the sampler if every column has one of its own.
    """
    text = w.node("LGTextEncode", (370, 74), title="Prompt", wide=320, clip=load[1], text=prompt)
    y = 300
    if negative is None:
        null = w.node("LGNullConditioning", (370, y), title="Negative: nothing said", wide=320, clip=load[1])
    else:
        null = w.node("LGTextEncode", (370, y), title="Negative", wide=320, text_height=60, clip=load[1], text=negative)
        y += 74
    size = empty(w, (370, y + 110), batch, side)
    noise = w.node("LGSeededNoise", (370, y + 316), wide=320, seed=seed, batch_size=batch)
    sampler = None
    if not own_samplers:
        sampler = w.node("KSamplerSelect", (370, y + 476), wide=320, sampler_name="dpmpp_2m")
        y += 110
    sigmas = w.node(
        "BasicScheduler", (370, y + 476), wide=320, model=load[0], scheduler="karras", steps=steps, denoise=1.0
    )
    return Shared(load, text, null, size, noise, sampler, sigmas)


def guided(
    w: Workflow,
    common: Shared,
    title: str,
    y: float,
    parts: Sequence[Node],
    rules: Output | None,
    *,
    x: float = 1130,
    sampler: Output | None = None,
    report: bool = False,
) -> Output:
    """Guider, sampling and decoder at (x, y), in one frame with ``parts``; the pictures. ``rules`` is the end of their chain."""
    link: dict[str, Any] = {} if rules is None else {"rules": rules}
    guider = w.node(
        "LGGuider", (x, y), wide=240, model=common.load[0], positive=common.prompt[0], negative=common.negative[0],
        report=report, **link,
    )  # fmt: skip
    sampler = sampler or (common.sampler[0] if common.sampler else None)
    if sampler is None:
        raise ValueError(f"{title} has no sampler, and none is shared")
    decode = sample(
        w, x + 290, y, common.load, guider[0], common.noise[0], sampler, common.sigmas[0], common.size[0]
    )  # fmt: skip
    w.group(title, [*parts, guider, w.nodes[-2], decode])
    return decode[0]


def columns(
    w: Workflow, common: Shared, chains: Sequence[tuple[str, Chain]], *, tall: float = 400.0
) -> list[tuple[str, Output]]:
    """A sampling for every (title, chain), ``tall`` below one another; (title, pictures) of each."""
    pictures = []
    for row, (title, chain) in enumerate(chains):
        y = place = 74 + row * tall
        parts: list[Node] = []
        link: dict[str, Output] = {}
        for kind, settings in chain:
            parts.append(w.node(kind, (760, place), wide=320, **settings, **link))
            link = {"rules": parts[-1][0]}
            place += parts[-1].size[1] + 70
        pictures.append((title, guided(w, common, title, y, parts, link.get("rules"))))
    return pictures


def sheet(w: Workflow, pictures: Sequence[tuple[str, Output]], name: str, *, x: float = 2030) -> Node:
    """One labelled sheet of all columns, saved; the node that saves it."""
    more = {f"images_{i}": picture for i, (_, picture) in enumerate(pictures[1:], start=2)}
    grid = w.node(
        "LGPictureGrid", (x, 74), wide=340, text_height=160, images=pictures[0][1], **more,
        labels="\n".join(title for title, _ in pictures), columns=len(pictures), gap=8,
    )  # fmt: skip
    save = w.node("SaveImage", (x, 600), wide=900, tall=520, images=grid[0], filename_prefix=name)
    w.group("The sheet", [grid, save], color="#88A")
    return save
