"""Example workflows of the pack's CFG++ samplers and of the report on what guided a run, on the bundled model."""

from __future__ import annotations

from collections.abc import Callable

from workflow_builder import Workflow
from workflow_parts import (
    CFG_SCALE,
    CHECKPOINT,
    CLASSIFIER_SCALE,
    SIDE,
    STEPS,
    emoji,
    empty,
    guided,
    sample,
    shared,
    sheet,
)

PLAIN, PLUS = 8.0, 0.6
"""Scale of CFG, strong on purpose, and of CFG++."""


def compare_cfg_plus_plus(w: Workflow) -> None:
    """One prompt and seed, by two samplers and by their CFG++ twins."""
    w.note(
        f"## CFG++ samplers\n\nThe same prompt and seeds by two samplers under strong guidance ({PLAIN:g}), and by their CFG++ twins. "
        "CFG++ noises each "
        "guided picture again with the noise that the *negative* sees, so that a strong push does not burn the colours.\n\n"
        "Its scale is another one: set `guidance_scale` in *CFG++ scale* between 0 (the negative alone) and 1; "
        f"{PLUS:g} here. More steps make "
        "the same value stronger. *CFG scale* is the usual one.",
        (0, -80),
        (300, 400),
        title="About this workflow",
        chinese=f"相同的提示词与种子，两种采样器在强引导（{PLAIN:g}）下的结果，以及它们的 CFG++ 版本。CFG++ 用 *反向条件* "
        "所见的噪声为引导后的"
        "画面重新加噪，因此强引导也不致颜色过饱和。它的强度含义不同：在 *CFG++ scale* 中把 `guidance_scale` 设在 0（只用"
        "反向条件）到 1 之间，这里是 "
        f"{PLUS:g}。步数越多，同一数值越强。*CFG scale* 则是通常的强度。",
    )
    load = emoji(w, (0, 430))
    common = shared(w, load, "cat face", own_samplers=True)
    plain = w.node("LGCFG", (0, 620), title="CFG scale", wide=300, guidance_scale=PLAIN)
    plus = w.node("LGCFG", (0, 770), title="CFG++ scale", wide=300, guidance_scale=PLUS)
    pictures = []
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
        pictures.append((title, guided(w, common, title, y, [sampler], scale[0], sampler=sampler[0])))
    sheet(w, pictures, w.name)
    common.group(w)
    w.group("Two scales", [plain, plus], color="#a1309b")


def guidance_report(w: Workflow) -> None:
    """A run with three rules, and what each of them did at every step."""
    w.note(
        "## What guided this run\n\nPrompt, interval and classifier at once, and a report of it: `report` is on in *Guider*, and *Guidance "
        "Report* gets the sampler's latent. Its curves go from the noisy start on the left to the end: the scale in force (the interval "
        "is where it rises), how far prompt and negative are apart, what each rule changed, how sure the classifier is.\n\n"
        "A guidance whose curve lies at the bottom all along does next to nothing: raise its scale. *Limited Interval* always lies there: "
        "what it does shows in the scale. The classifier is strong at the noisy start; whether it won is what the probability at the end "
        f"says. The scales ({CFG_SCALE:g} and {CLASSIFIER_SCALE:g}) are the recommended ones.",
        (0, -80),
        (300, 400),
        title="About this workflow",
        chinese="提示词、区间与分类器同时作用，并给出报告：*Guider* 的 `report` 已打开，*Guidance Report* 接收采样器的潜变量。曲"
        "线从左端的噪声起点到终点：当前强度（区间即其升高之处）、正反向估计相距多远、每条规则改变了多少、分类器有多大把握。"
        "始终贴着底部的引导几乎没有作用：请提高强度。*Limited Interval* 总在底部：它的作用体现在强度曲线上。分类器在噪声较大的开头"
        f"最强；它是否占上风，要看最后的概率。两个强度（{CFG_SCALE:g} 与 {CLASSIFIER_SCALE:g}）都是推荐值。",
    )
    load = emoji(w, (0, 430))
    classifier = w.node("LGLoadClassifier", (0, 600), wide=300, classifier=CHECKPOINT)
    prompt = w.node("LGTextEncode", (370, 74), title="Prompt", wide=320, clip=load[1], text="person")
    null = w.node("LGNullConditioning", (370, 300), title="Negative: nothing said", wide=320, clip=load[1])
    size = empty(w, (370, 410), 4, SIDE)
    cfg = w.node("LGCFG", (760, 74), wide=320, guidance_scale=CFG_SCALE)
    interval = w.node("LGLimitedInterval", (760, 204), wide=320, sigma_lo=0.3, sigma_hi=5.0, rules=cfg[0])
    rule = w.node(
        "LGClassifierGuidance", (760, 360), wide=320, classifier=classifier[0], label="Smileys & Emotion",
        guidance_scale=CLASSIFIER_SCALE, rules=interval[0],
    )  # fmt: skip
    guider = w.node(
        "LGGuider", (1150, 74), wide=280, model=load[0], positive=prompt[0], negative=null[0], rules=rule[0], report=True
    )  # fmt: skip
    noise = w.node("LGSeededNoise", (1150, 250), wide=280, seed=1, batch_size=4)
    sampler = w.node("KSamplerSelect", (1150, 410), wide=280, sampler_name="dpmpp_2m_sde")
    sigmas = w.node(
        "BasicScheduler", (1150, 520), wide=280, model=load[0], scheduler="karras", steps=STEPS, denoise=1.0
    )
    decode = sample(w, 1500, 74, load, guider[0], noise[0], sampler[0], sigmas[0], size[0])
    run = w.nodes[-2]
    save = w.node("SaveImage", (1500, 480), wide=520, tall=330, images=decode[0], filename_prefix=w.name)
    report = w.node("LGGuidanceReport", (2090, 74), wide=300, latent=run[0])
    plot = w.node("SaveImage", (2090, 210), wide=640, tall=600, images=report[0], filename_prefix=f"{w.name}_plot")
    w.group("Models", [load, classifier], color="#8A8")
    w.group("What to draw", [prompt, null, size])
    w.group("Rules", [cfg, interval, rule], color="#a1309b")
    w.group("Sampling", [guider, noise, sampler, sigmas], color="#b58b2a")
    w.group("Pictures", [run, decode, save], color="#88A")
    w.group("The report", [report, plot], color="#a1309b")


GRAPHS: dict[str, Callable[[Workflow], None]] = {
    graph.__name__: graph for graph in (compare_cfg_plus_plus, guidance_report)
}
