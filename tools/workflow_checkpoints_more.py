"""More example workflows for the checkpoints that people have: losses, weakened passes, samplers; SD 1.5, and SD3 for flow models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core_nodes import CLIP
from workflow_builder import Node, Output, Workflow
from workflow_checkpoints import NEGATIVE, PROMPT, SD3, SD15, about, compare, load_own
from workflow_parts import Chain, Shared, guided, shared, sheet


def sd15_weakened(w: Workflow) -> None:
    """Away from the same network with one of its strengths taken away."""
    about(
        w,
        "Away from a weakened self",
        "SD 1.5",
        "Each picture adds one rule to a mild CFG. The network draws a second time with something taken away (*PAG*: no place sees "
        "another, *SEG*: blurred sight, *skipped*: layers, *shuffled*: places, *windows*: the whole), and the picture goes away from that: "
        "shapes hold together better. `scale` says how far; one pass more a step (*windows* one and a half).",
        "每张图片在温和的 CFG 之上加一条规则：让网络在失去某种能力的情况下再算一次（*PAG*：看不到其他位置；*SEG*：视野模"
        "糊；*skipped*：跳过若干层；*shuffled*：打乱位置；*windows*：看不到整体），然后远离该结果，形状更稳固。`scale` 决"
        "定远离多少；每步多一次计算（*windows* 一次半）。",
    )
    cfg = ("LGCFG", {"guidance_scale": 4.0})
    compare(
        w,
        4.0,
        [
            ("PAG", [cfg, ("LGPerturbedAttention", {})]),
            ("SEG", [cfg, ("LGSmoothedEnergy", {})]),
            ("skipped", [cfg, ("LGSkippedLayers", {})]),
            ("shuffled", [cfg, ("LGTokenPerturbation", {})]),
            ("windows", [cfg, ("LGSlidingWindow", {})]),
        ],
        tall=440.0,
    )


def _same(w: Workflow, load: Node, **options: Any) -> tuple[Shared, Node]:
    """What all rows share, and CFG for all."""
    common = shared(w, load, PROMPT, negative=NEGATIVE, batch=1, side=512, **options)
    below = common.sigmas.position[1] + common.sigmas.size[1] + 50
    return common, w.node("LGCFG", (370, below), title="CFG for all", wide=320, guidance_scale=7.5)


def _followed(
    w: Workflow, common: Shared, cfg: Node, rows: list[tuple[str, list[Node], Output, str, dict[str, Any]]]
) -> list[tuple[str, Output]]:
    """A sampling for every (title, nodes, loss, rule, settings), the nodes standing where they stand; and one without, first."""
    pictures = [("CFG 7.5", guided(w, common, "CFG 7.5", 74, [], cfg[0], x=1500))]
    for title, parts, loss, kind, settings in rows:
        y = 74 + len(pictures) * 440.0
        rule = w.node(kind, (1130, y), wide=320, loss=loss, vae=common.load[2], rules=cfg[0], **settings)
        pictures.append((title, guided(w, common, title, y, [*parts, rule], rule[0], x=1500)))
    return pictures


def sd15_losses(w: Workflow) -> None:
    """Losses on the decoded picture, followed at the estimate and through the model."""
    about(
        w,
        "Losses on the picture",
        "SD 1.5",
        "A loss says what the finished picture should come closer to: a palette, its mirror image, the palette in its left half only. "
        "*MPGD* is cheap; *DPS* goes back through the model: three times as slow at the steps at which it acts, and it needs the memory "
        "of a training step. `guidance_scale` says how hard. `decode_at` 0.5 decodes at half size, for a quarter of the VAE's time "
        "and memory.",
        "损失说明成品画面应更接近什么：调色板、自己的镜像、只在左半边的调色板。*MPGD* 开销小；*DPS* 要反向穿过模型：起作"
        "用的步骤慢三倍，并需要相当于一次训练步的显存。`guidance_scale` 决定力度。`decode_at` 0.5 以一半大小解码，VAE 的"
        "时间与显存降为四分之一。",
    )
    load = load_own(w, SD15)
    common, cfg = _same(w, load)
    at = 760.0
    rows = [74 + i * 440.0 for i in range(5)]
    palette = w.node("LGLossPalette", (at, rows[1]), wide=320, colours="#12355b, #f2a541, #f5e6c8")
    symmetry = w.node("LGLossSymmetry", (at, rows[2]), wide=320)
    nothing = w.node("SolidMask", (0, 620), title="Nowhere", wide=300, value=0.0, width=512, height=512)
    half = w.node("SolidMask", (0, 780), title="Half", wide=300, value=1.0, width=256, height=512)
    left = w.node(
        "MaskComposite",
        (0, 940),
        title="The left half",
        wide=300,
        destination=nothing[0],
        source=half[0],
        operation="add",
    )
    masked = w.node("LGLossMask", (at, rows[3]), wide=320, loss=palette[0], mask=left[0])
    pull = {"guidance_scale": 0.2, "decode_at": 0.5}
    pictures = _followed(
        w,
        common,
        cfg,
        [
            ("palette", [palette], palette[0], "LGMPGD", pull),
            ("symmetry", [symmetry], symmetry[0], "LGMPGD", pull),
            ("left half", [masked], masked[0], "LGMPGD", pull),
            ("through the model", [], palette[0], "LGDPS", {**pull, "every_k": 2}),
        ],
    )
    sheet(w, pictures, w.name, x=2400)
    common.group(w, [cfg])
    w.group("Model", [load], color="#8A8")
    w.group("A mask", [nothing, half, left], color="#a1309b")


def sd15_clip_text(w: Workflow) -> None:
    """A text followed by a CLIP that looks at the decoded picture."""
    about(
        w,
        "A text, by a CLIP that looks",
        "SD 1.5",
        f"It also needs OpenAI's CLIP ViT-L/14: `model.safetensors` of *openai/clip-vit-large-patch14* on Hugging Face, as "
        f"`{CLIP}` in both `models/clip_vision` and `models/text_encoders`. It looks at cutouts of the decoded picture and pulls it "
        "towards *texts*; a weight below 0 pushes away: `a photograph:-1`. `crops` costs time, `guidance_scale` in *MPGD* says how hard.",
        "还需要 OpenAI 的 CLIP ViT-L/14：Hugging Face 上 *openai/clip-vit-large-patch14* 的 `model.safetensors`，以 "
        f"`{CLIP}` 为名放进 `models/clip_vision` 和 `models/text_encoders`。它读取解码后画面的裁块，把画面拉向 *texts*；权"
        "重小于 0 则推离：`a photograph:-1`。`crops` 越多越慢，*MPGD* 的 `guidance_scale` 决定力度。",
    )
    load = load_own(w, SD15)
    vision = w.node("CLIPVisionLoader", (0, 620), wide=300, clip_name=CLIP)
    text = w.node("CLIPLoader", (0, 750), wide=300, clip_name=CLIP, type="stable_diffusion")
    clip = w.node("LGPictureCLIP", (0, 920), wide=300, clip_vision=vision[0], clip=text[0])
    common, cfg = _same(w, load)
    rows: list[tuple[str, list[Node], Output, str, dict[str, Any]]] = []
    for row, (title, texts) in enumerate(
        (("oil painting", "an oil painting, thick paint"), ("not a photograph", "a photograph:-1")), start=1
    ):
        loss = w.node("LGLossCLIPText", (760, 74 + row * 440.0), wide=320, clip=clip[0], texts=texts)
        rows.append((title, [loss], loss[0], "LGMPGD", {"guidance_scale": 0.2}))
    sheet(w, _followed(w, common, cfg, rows), w.name, x=2400)
    common.group(w, [cfg])
    w.group("Model", [load], color="#8A8")
    w.group("A CLIP that looks", [vision, text, clip], color="#a1309b")


def sd15_cfg_plus_plus(w: Workflow) -> None:
    """CFG++ as samplers, beside plain CFG; and a report of one run."""
    about(
        w,
        "CFG++ samplers",
        "SD 1.5",
        "*DPM++ 2M* and *DDIM* under strong CFG, and their CFG++ twins, which noise the guided picture again with the noise that the "
        "negative sees. The CFG++ scale lies between 0 and 1; more steps make the same value stronger. *Guidance Report* draws what guided "
        "the last run, step by step.",
        "*DPM++ 2M* 与 *DDIM* 在强 CFG 下的结果，以及它们的 CFG++ 版本：后者用反向条件所见的噪声为引导后的画面重新加噪。"
        "CFG++ 的强度在 0 到 1 之间；步数越多，同一数值越强。*Guidance Report* 逐步画出最后一次采样受到了怎样的引导。",
    )
    load = load_own(w, SD15)
    common = shared(w, load, PROMPT, negative=NEGATIVE, batch=1, side=512, steps=30, own_samplers=True)
    plain = w.node("LGCFG", (0, 620), title="CFG scale", wide=300, guidance_scale=10.0)
    plus = w.node("LGCFG", (0, 770), title="CFG++ scale", wide=300, guidance_scale=0.6)
    pictures: list[tuple[str, Output]] = []
    for row, (title, kind, settings, scale) in enumerate(
        (
            ("DDIM", "LGSamplerDDIM", {}, plain),
            ("DDIM CFG++", "LGSamplerDDIMCFGpp", {}, plus),
            ("DPM++ 2M", "KSamplerSelect", {"sampler_name": "dpmpp_2m"}, plain),
            ("DPM++ 2M CFG++", "LGSamplerDPMpp2MCFGpp", {}, plus),
        )
    ):
        y = 74 + row * 400.0
        sampler = w.node(kind, (760, y), wide=320, **settings)
        last = row == 3
        pictures.append((title, guided(w, common, title, y, [sampler], scale[0], sampler=sampler[0], report=last)))
    run = w.nodes[-2]
    sheet(w, pictures, w.name)
    report = w.node("LGGuidanceReport", (2030, 1274), wide=300, latent=run[0])
    plot = w.node("PreviewImage", (2380, 1274), wide=550, tall=500, title="What guided the last run", images=report[0])
    common.group(w)
    w.group("Two scales", [plain, plus], color="#a1309b")
    w.group("The report", [report, plot], color="#a1309b")


def sd3_rectified_cfg_plus_plus(w: Workflow) -> None:
    """Rectified-CFG++ on a flow model, beside plain CFG."""
    about(
        w,
        "Rectified-CFG++",
        "SD3",
        "SD3 and SD3.5 are flow models. *Rectified-CFG++* steps along the prompt's own path and corrects it by what prompt and "
        "negative say half a step ahead: three passes a step, so it has two thirds of the steps here. Its `scale` is like that of CFG "
        "less 1; its guider has no CFG.",
        "SD3 与 SD3.5 是 flow 模型。*Rectified-CFG++* 沿提示词自身的路径前进，再按前方半步处正反向条件之差修正：每步三次"
        "网络调用，所以这里的步数是三分之二。它的 `scale` 相当于 CFG 强度减 1；它的引导器没有 CFG。",
    )
    load = load_own(w, SD3)
    prompt = w.node("LGTextEncode", (370, 74), title="Prompt", wide=320, clip=load[1], text=PROMPT)
    negative = w.node(
        "LGTextEncode", (370, 300), title="Negative", wide=320, text_height=60, clip=load[1], text=NEGATIVE
    )
    size = w.node("LGEmptyLatent", (370, 484), wide=320, width=1024, height=1024, channels=16, batch_size=1)
    noise = w.node("LGSeededNoise", (370, 734), wide=320, seed=1, batch_size=1)
    pictures: list[tuple[str, Output]] = []
    cfg: Chain = [("LGCFG", {"guidance_scale": 4.5})]
    for row, (title, kind, settings, steps, chain) in enumerate(
        (
            ("CFG", "KSamplerSelect", {"sampler_name": "euler"}, 30, cfg),
            ("Rectified-CFG++", "LGSamplerRectifiedCFGpp", {"scale": 3.0}, 20, []),
        )
    ):
        y = 74 + row * 480.0
        sampler = w.node(kind, (760, y), wide=320, **settings)
        sigmas = w.node(
            "BasicScheduler", (760, y + 140), wide=320, model=load[0], scheduler="sgm_uniform", steps=steps, denoise=1.0
        )
        parts = [sampler, sigmas, *(w.node(rule, (760, y + 310), wide=320, **knobs) for rule, knobs in chain)]
        common = Shared(load, prompt, negative, size, noise, sampler, sigmas)
        pictures.append((title, guided(w, common, title, y, parts, parts[2][0] if chain else None)))
    sheet(w, pictures, w.name)
    w.group("Model", [load], color="#8A8")
    w.group("The same for both", [prompt, negative, size, noise], color="#b58b2a")


GRAPHS: dict[str, Callable[[Workflow], None]] = {
    graph.__name__: graph
    for graph in (sd15_weakened, sd15_losses, sd15_clip_text, sd15_cfg_plus_plus, sd3_rectified_cfg_plus_plus)
}
