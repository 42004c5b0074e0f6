"""Example workflows that follow a gradient, on the bundled model: losses on the estimate, a noisy-latent CLIP, a CLIP on pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workflow_builder import Node, Output, Workflow
from workflow_parts import CFG_SCALE, CHECKPOINT, SIDE, STEPS, Shared, emoji, guided, shared, sheet

PROMPT = "person"
PULL, HALF = 0.3, 0.15
"""Scales of a loss, and of one that is followed twice: strong enough to be seen beside HOLD."""
HOLD = 3.0
"""CFG under which a prompt holds its own against the pull of a loss: by eye, and the notes say so; alone, a name needs less."""
SHORT, FEW = 16, 2
"""Steps and pictures: the VAE is run forwards and backwards at each step."""
RULES, GUIDING = 1130, 1500
"""Where the columns of rules and of guiders begin."""

Row = tuple[str, Sequence[Node], Output | None]
"""Title, the nodes of its own, and the end of its chain of rules."""


def _same(w: Workflow, load: Node, prompt: str = PROMPT, *, scale: float = HOLD) -> tuple[Shared, Node]:
    """What all rows share, and classifier-free guidance for all."""
    common = shared(w, load, prompt, batch=FEW, steps=SHORT, seed=1)
    below = common.sigmas.position[1] + common.sigmas.size[1] + 50
    return common, w.node("LGCFG", (370, below), title="CFG for all", wide=320, guidance_scale=scale)


def _sampled(w: Workflow, common: Shared, rows: Sequence[Row]) -> list[tuple[str, Output]]:
    """A sampling for every row, in line with the first node of its own."""
    pictures: list[tuple[str, Output]] = []
    y = 74.0
    for title, parts, rules in rows:
        y = parts[0].position[1] if parts else y
        pictures.append((title, guided(w, common, title, y, parts, rules, x=GUIDING)))
    return pictures


def _follow(w: Workflow, load: Node, text: str, y: float) -> tuple[Output, Output]:
    """A picture drawn for others to follow, so that the example needs no file: (picture, latent)."""
    prompt = w.node(
        "LGTextEncode", (0, y), title="Picture to follow", wide=300, text_height=60, clip=load[1], text=text
    )
    null = w.node("LGNullConditioning", (0, y + 170), wide=300, clip=load[1])
    size = w.node("EmptyLatentImage", (0, y + 280), wide=300, width=SIDE, height=SIDE, batch_size=1)
    draw = w.node(
        "KSampler", (0, y + 440), wide=300, model=load[0], positive=prompt[0], negative=null[0], latent_image=size[0],
        seed=1, steps=SHORT, cfg=CFG_SCALE, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0,
    )  # fmt: skip
    decode = w.node("VAEDecode", (0, y + 780), wide=300, samples=draw[0], vae=load[2])
    encode = w.node("LGVAEEncode", (0, y + 890), wide=300, image=decode[0], vae=load[2], posterior="mode", seed=0)
    w.group("A picture to follow", [prompt, null, size, draw, decode, encode], color="#a1309b")
    return decode[0], encode[0]


def compare_losses(w: Workflow) -> None:
    """One prompt and seed, pulled towards something else that can be said of the finished picture in every column."""
    w.note(
        "## Losses\n\nA loss says what the finished picture should come closer to; here *MPGD* follows each of them at every step, next "
        f"to the prompt, which CFG at {HOLD:g} lets hold its own. *palette*: towards these colours. *symmetry*: its own mirror image. "
        "*edges* and *reference*: the outlines, and the "
        "coarse colours, of the picture that the purple nodes draw; put a *Load Image* there for one of your own. *label*: a group of "
        "emoji, by the classifier. *both*: palette and symmetry, weighted.\n\n`guidance_scale` in *MPGD* says how hard: 0 is off, 0.1 a "
        f"touch, {PULL:g} what stands here (*both*: {HALF:g}); much above 0.5 the picture comes apart.",
        (0, -80),
        (300, 440),
        title="About this workflow",
        chinese="损失说明成品画面应更接近什么；这里由 *MPGD* 在每一步遵循它，与提示词并行；CFG 取 "
        f"{HOLD:g}，使提示词不被盖过。"
        "*palette*：趋向这些颜色。*symmetry*："
        "与自己的镜像一致。*edges* 与 *reference*：紫色节点所画图片的轮廓与大致色彩，可在那里换成“加载图像”。*label*：由"
        "分类器判断的一类 emoji。*both*：调色板与对称的加权和。*MPGD* 的 `guidance_scale` 决定力度：0 关闭，0.1 轻微，"
        f"这里为 {PULL:g}（*both* 为 {HALF:g}），远"
        "大于 0.5 时画面会散掉。",
    )
    load = emoji(w, (0, 490))
    classifier = w.node("LGLoadClassifier", (0, 640), wide=300, classifier=CHECKPOINT)
    picture, latent = _follow(w, load, FOLLOWED, 880)
    common, cfg = _same(w, load)
    losses: tuple[tuple[str, str, dict[str, Any], float], ...] = (
        ("palette", "LGLossPalette", {"colours": COLOURS}, PULL),
        ("symmetry", "LGLossSymmetry", {}, PULL),
        ("edges", "LGLossEdges", {"sketch": picture}, PULL),
        ("reference", "LGLossReference", {"reference": latent, "low_pass": 4}, PULL),
        ("label", "LGLossClassLabel", {"classifier": classifier[0], "label": "Flags"}, PULL),
    )
    rows: list[Row] = []
    made: dict[str, Output] = {}
    y = 474.0
    for title, kind, settings, scale in losses:
        loss = w.node(kind, (760, y), wide=320, **settings)
        made[title] = loss[0]
        rows.append(_mpgd(w, title, [loss], y, load, cfg, scale))
        y += 400
    both = w.node("LGLossSum", (760, y), wide=320, loss_1=made["palette"], loss_2=made["symmetry"])
    rows.append(_mpgd(w, "both", [both], y, load, cfg, HALF))
    plain: Row = ("prompt alone", [], cfg[0])
    sheet(w, _sampled(w, common, [plain, *rows]), w.name, x=2400)
    common.group(w, [cfg])
    w.group("Models", [load, classifier], color="#8A8")


def _mpgd(w: Workflow, title: str, losses: list[Node], y: float, load: Node, cfg: Node, scale: float) -> Row:
    """A row with a loss and MPGD that follows it."""
    rule = w.node("LGMPGD", (RULES, y), wide=320, loss=losses[-1][0], vae=load[2], rules=cfg[0], guidance_scale=scale)
    return title, [*losses, rule], rule[0]


def compare_loss_rules(w: Workflow) -> None:
    """One loss, followed by every rule there is for it."""
    w.note(
        "## Six rules that follow a loss\n\nThe same prompt (CFG at "
        f"{HOLD:g}), seeds and palette under all rules that follow a loss. "
        "*MPGD* pulls at the "
        "estimate of the finished picture and is cheap. *DPS*, *LGD-MC* and *FreeDoM* go back through the diffusion model: "
        "about three times as slow, and what they change fits the rest of the picture better. *Universal* and *TFG* do both.\n\n"
        "With `scaling` *relative* all scales have the same unit: the share of a step that the pull may take; "
        f"{PULL:g} here, {HALF:g} for the two that pull twice. `every_k`, `sigma_lo` and "
        "`sigma_hi` say at which steps a rule acts; `decode_at` 0.5 lets the loss look at half-size pictures, which is four times as fast.",
        (0, -80),
        (300, 440),
        title="About this workflow",
        chinese=f"相同的提示词（CFG 取 {HOLD:g}）、种子与调色板，"
        "由所有遵循损失的规则引导。*MPGD* 在成品画面的估计处拉动，开销小。*DPS*、*LGD-MC* 与 "
        "*FreeDoM* 要反向穿过扩散模型：约慢三倍，但所改变的部分与画面其余部分更协调。*Universal* 与 *TFG* 两者都做。"
        "`scaling` 为 *relative* 时各强度单位相同：拉力占一步的比例；"
        f"这里为 {PULL:g}，拉动两次的规则为 {HALF:g}。"
        "`every_k`、`sigma_lo`、`sigma_hi` 决定规则在哪些步起"
        "作用；`decode_at` 0.5 让损失只看一半大小的图片，快四倍。",
    )
    load = emoji(w, (0, 490))
    common, cfg = _same(w, load)
    loss = w.node("LGLossPalette", (0, 640), title="Loss for all", wide=300, colours=COLOURS)
    rows: list[Row] = []
    y = 474.0
    for title, kind, settings in (
        ("MPGD", "LGMPGD", {"guidance_scale": PULL}),
        ("DPS", "LGDPS", {"guidance_scale": PULL}),
        ("LGD-MC", "LGLossGuidedDiffusion", {"guidance_scale": PULL, "draws": 2}),
        ("FreeDoM", "LGFreeDoM", {"guidance_scale": PULL}),
        ("universal", "LGUniversalGuidance", {"guidance_scale": HALF, "step_size": 0.1, "steps": 2}),
        ("TFG", "LGTrainingFreeGuidance", {"guidance_scale": HALF, "mean_scale": HALF, "iterations": 1}),
    ):
        rule = w.node(
            kind, (RULES, y), wide=320, loss=loss[0], vae=load[2], rules=cfg[0], decode_at=0.5, **settings
        )  # fmt: skip
        rows.append((title, [rule], rule[0]))
        y += max(400.0, rule.size[1] + 130)
    plain: Row = ("prompt alone", [], cfg[0])
    sheet(w, _sampled(w, common, [plain, *rows]), w.name, x=2400)
    common.group(w, [cfg])
    w.group("Model and loss", [load, loss], color="#8A8")


TOUCH, FIRM = 2.0, 8.0
"""Scales of the noisy-latent CLIP, for a word that it knows well."""


def noisy_clip(w: Workflow) -> None:
    """An empty prompt, and a CLIP that reads noisy latents: towards a text, away from another."""
    w.note(
        "## Your words, by a noisy-latent CLIP\n\nThe prompt is empty: the diffusion model is told nothing. What reads your words is a "
        "small CLIP that was trained on noisy latents, and its gradient pulls at every step. It works on a model that takes no "
        "prompt at all, and with every sampler.\n\n`guidance_scale` 1 is the CLIP's own opinion, more is clearer and less varied up to a "
        f"point: here {TOUCH:g} and {FIRM:g}, while names of this model want about 20. *away* names what the picture should not be. The "
        "words must be encoded by the text encoder that the CLIP was trained with.",
        (0, -80),
        (300, 440),
        title="About this workflow",
        chinese="提示词为空，扩散模型一无所知。读你文字的是一个在带噪潜变量上训练的小 CLIP，它的梯度在每一步拉动画面。它也可用于"
        "完全不接受提示词的模型，适用于任何采样器。`guidance_scale` 1 是 CLIP 本身的判断，在一定范围内越大越明确、多样性越低："
        f"这里用 {TOUCH:g} 与 {FIRM:g}，此模型的名称则约需 20。"
        "*away* 写画面不应是什么。文字须由训练该 CLIP 时所用的文本编码器编码。",
    )
    load = emoji(w, (0, 490))
    clip = w.node("LGLoadNoisyCLIP", (0, 640), wide=300, noisy_clip=CHECKPOINT)
    target = w.node("LGTextEncode", (0, 830), title="Towards", wide=300, text_height=60, clip=load[1], text="flag")
    away = w.node("LGTextEncode", (0, 1000), title="Away from", wide=300, text_height=60, clip=load[1], text="red")
    null = w.node("LGNullConditioning", (370, 74), title="No prompt", wide=320, clip=load[1])
    size = w.node("EmptyLatentImage", (370, 184), wide=320, width=SIDE, height=SIDE, batch_size=4)
    noise = w.node("LGSeededNoise", (370, 390), wide=320, seed=1, batch_size=4)
    sampler = w.node("KSamplerSelect", (370, 550), wide=320, sampler_name="dpmpp_2m_sde")
    sigmas = w.node("BasicScheduler", (370, 660), wide=320, model=load[0], scheduler="karras", steps=STEPS, denoise=1.0)
    common = Shared(load, null, null, size, noise, sampler, sigmas)
    pictures: list[tuple[str, Output]] = []
    for row, (title, settings) in enumerate(
        (
            ("no words", None),
            (f"towards, scale {TOUCH:g}", {"guidance_scale": TOUCH}),
            (f"towards, scale {FIRM:g}", {"guidance_scale": FIRM}),
            ("and away", {"guidance_scale": FIRM, "away": away[0]}),
        )
    ):
        y, parts = 74 + row * 440.0, []
        if settings is not None:
            parts = [
                w.node("LGNoisyCLIPGuidance", (760, y), wide=320, noisy_clip=clip[0], target=target[0], **settings)
            ]
        pictures.append((title, guided(w, common, title, y, parts, parts[0][0] if parts else None)))
    sheet(w, pictures, w.name)
    w.group("Models", [load, clip], color="#8A8")
    w.group("Words", [target, away], color="#a1309b")
    w.group("The same for all", [null, size, noise, sampler, sigmas], color="#b58b2a")


FOLLOWED = "red heart"
COLOURS = "#1d4ed8, #93c5fd, white"

GRAPHS: dict[str, Callable[[Workflow], None]] = {
    graph.__name__: graph for graph in (compare_losses, compare_loss_rules, noisy_clip)
}
