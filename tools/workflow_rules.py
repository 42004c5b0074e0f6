"""Example workflows that set rules side by side, on the bundled model; and one that loads its parts by themselves."""

from __future__ import annotations

from collections.abc import Callable

from workflow_builder import Workflow
from workflow_graphs import LABEL
from workflow_parts import (
    CFG_SCALE,
    CHECKPOINT,
    RAW_SCALE,
    RAW_STEPS,
    STEPS,
    WORD_SCALE,
    Chain,
    columns,
    emoji,
    sample,
    shared,
    sheet,
)

STRONG, COARSE = 8.0, 3.0
FIRST, SECOND = 3.0, 4.0
"""Scales of two prompts that are both asked for: by eye."""
MEAN_SHIFT, POST_STEP = 15.0, 0.5
"""The recommended scale, and the strongest that was tried: docs/RULES_TABLE.md."""
RAW = {"guidance_scale": RAW_SCALE, "scaling": "raw"}
CFG: Chain = (("LGCFG", {"guidance_scale": STRONG}),)


def compare_rules(w: Workflow) -> None:
    """One prompt, the same noise, eight rules around classifier-free guidance, in one labelled sheet."""
    w.note(
        f"## Compare guidance rules\n\nThe same four noises and one prompt under eight ways of strong guidance "
        f"(`guidance_scale` {STRONG:g}; in *frequencies* for fine detail alone, {COARSE:g} for the rest). "
        "Plain CFG comes first; each other column has one rule more, or another rule in its place.\n\n"
        "Change the prompt, the seed or a rule's settings; every rule's help page says what it does and where it comes from.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese=f"相同的四份噪声与同一提示词，八种强引导的方式（`guidance_scale` 为 {STRONG:g}；*frequencies* 只对细节如此，其余为 "
        f"{COARSE:g}）。第一列是普通 CFG；其余各列多一条"
        "规则，或换成另一条规则。可以改提示词、种子或规则的设置；每条规则的帮助页说明它做什么、出自哪里。",
    )
    common = shared(w, emoji(w, (0, 430)), "flag: France")
    chains: list[tuple[str, Chain]] = [
        ("CFG", CFG),
        ("CFG-Zero*", [("LGCFGZeroStar", {"guidance_scale": STRONG})]),
        ("frequencies", [("LGFrequencyDecoupled", {"scale_low": COARSE, "scale_high": STRONG})]),
        ("interval", [*CFG, ("LGLimitedInterval", {"sigma_lo": 0.3, "sigma_hi": 5.0})]),
        ("rescaled", [*CFG, ("LGRescaleGuidance", {})]),
        ("projected", [*CFG, ("LGAdaptiveProjectedGuidance", {})]),
        ("tangential", [*CFG, ("LGTangentialCFG", {})]),
        ("magnitude", [*CFG, ("LGMagnitudeAware", {})]),
    ]
    sheet(w, columns(w, common, chains), "compare_rules")
    common.group(w)


def compare_more_rules(w: Workflow) -> None:
    """One prompt, the same noise: scales that change along the way, and what is done to the guided estimate."""
    w.note(
        f"## Compare more guidance rules\n\nThe same four noises and one prompt at `guidance_scale` {STRONG:g}. *schedule* and *curve* "
        "change the scale along the way, *adaptive* stops guiding once prompt and negative agree (and saves their second pass); "
        "*thresholded*, *momentum* and *sliding mode* change what guidance does to the picture; *angle* turns the estimate where CFG "
        "pushes it.\n\n"
        "Every rule's help page says what it does and where it comes from.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese=f"相同的四份噪声与同一提示词，`guidance_scale` 为 {STRONG:g}。*schedule*（调度）与 *curve*（曲线）沿途改变强度；"
        "*adaptive*（自适应）在正反向一致后停止引导，并省下第二次计算；*thresholded*（阈值）、*momentum*（动量）与 "
        "*sliding mode*（滑模）改变引导对画面的作用；*angle*（角度）转动估计，而 CFG 是推动它。每条规则的帮助页说明它做什"
        "么、出自哪里。",
    )
    common = shared(w, emoji(w, (0, 430)), "flag: France")
    chains: list[tuple[str, Chain]] = [
        ("CFG", CFG),
        ("schedule", [*CFG, ("LGGuidanceSchedule", {})]),
        ("curve", [*CFG, ("LGGuidanceCurve", {"curve": "14:1, 5:8, 1:8, 0.3:2"})]),
        ("adaptive", [*CFG, ("LGAdaptiveGuidance", {"threshold": 0.99})]),
        ("thresholded", [*CFG, ("LGDynamicThresholding", {"plain_scale": 4.0})]),
        ("momentum", [*CFG, ("LGMomentumGuidance", {})]),
        ("sliding mode", [*CFG, ("LGSlidingModeCFG", {})]),
        ("angle", [("LGAngleDomain", {"guidance_scale": STRONG})]),
    ]
    sheet(w, columns(w, common, chains), "compare_more_rules")
    common.group(w)


def compare_weakened(w: Workflow) -> None:
    """One prompt and seed, no negative: away from five passes of the same network, each weakened in its own way."""
    w.note(
        "## Away from a weakened self\n\nThese rules need no negative prompt. Each lets the network draw a second time with one of its "
        "strengths taken away, and goes away from that: *PAG* without seeing other places, *SEG* with blurred sight, *skipped* without "
        "some layers, *shuffled* with its places mixed up, *windows* through small windows only. Shapes gain hold and contrast.\n\n"
        "`scale` says how far: 0 is off; if colours burn it is too much. `layers` says where: `middle` is gentle, `all` is strong. Every "
        "one adds up with *CFG*, and costs one pass more (*windows* one and a half). The scales here are set by eye for this prompt; "
        "help pages say what was measured.",
        (0, -80),
        (300, 440),
        title="About this workflow",
        chinese="这些规则不需要反向提示词：让网络在失去某种能力的情况下再算一次，然后远离该结果。*PAG* 看不到其他位置，*SEG* 视野"
        "模糊，*skipped* 跳过若干层，*shuffled* 打乱位置，*windows* 只透过小窗口。形状因此更稳固、更有对比。`scale` 决定"
        "远离多少：0 关闭，颜色过饱和说明太大。`layers` 决定在哪些层：`middle` 温和，`all` 强烈。都可与 *CFG* 叠加，每步"
        "多一次计算（*windows* 一次半）。这里的强度是针对此提示词凭目测设定的；测得的数值见帮助页。",
    )
    common = shared(w, emoji(w, (0, 490)), "person", batch=2)
    chains: list[tuple[str, Chain]] = [
        ("prompt alone", []),
        ("PAG", [("LGPerturbedAttention", {"scale": 1.5, "layers": "all"})]),
        ("SEG", [("LGSmoothedEnergy", {"scale": 2.0, "layers": "all"})]),
        ("skipped", [("LGSkippedLayers", {})]),
        ("shuffled", [("LGTokenPerturbation", {"scale": 4.0})]),
        ("windows", [("LGSlidingWindow", {"scale": 0.6})]),
    ]
    sheet(w, columns(w, common, chains), w.name)
    common.group(w)


def compare_negatives(w: Workflow) -> None:
    """What a second prompt can do: as negative, as Perp-Neg, as a condition beside the first."""
    w.note(
        f"## Two prompts\n\nThe same four noises under two prompts, each by itself and then joined in three ways, at a `guidance_scale` of "
        f"{WORD_SCALE:g}. As plain *negative* it pushes away from all "
        "that it says; *Perp-Neg* takes away only what it does not share with the prompt; *both* asks for the two at once, with a scale "
        f"for each ({FIRST:g} and {SECOND:g}).",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese="相同的四份噪声，两个提示词先各自单独使用，再以三种方式结合；"
        f"`guidance_scale` 为 {WORD_SCALE:g}。作普通反向 (*negative*) "
        "时远离它所说的一切；*Perp-Neg* 只去掉它与提示词"
        "不重合的部分；*both* 同时要求两者，各有强度"
        f"（{FIRST:g} 与 {SECOND:g}）。",
    )
    load = emoji(w, (0, 430))
    second = w.node(
        "LGTextEncode", (0, 620), title="Second prompt", wide=300, text_height=60, clip=load[1], text="red heart"
    )
    common = shared(w, load, "smiling face with hearts")
    four: Chain = (("LGCFG", {"guidance_scale": WORD_SCALE}),)
    first = columns(
        w,
        common,
        [
            ("prompt", four),
            ("Perp-Neg", [("LGPerpNeg", {"negative": second[0], "guidance_scale": WORD_SCALE})]),
            (
                "both",
                [
                    (
                        "LGTwoConditions",
                        {"condition": second[0], "first_scale": FIRST, "second_scale": SECOND, "form": "sum"},
                    )
                ],
            ),
        ],
    )
    pictures = dict(first)
    for row, (title, prompt, negative) in enumerate(
        (("second prompt", second, common.negative), ("negative", common.prompt, second)), start=len(first)
    ):
        y = 74 + row * 400.0
        rule = w.node("LGCFG", (760, y), wide=320, guidance_scale=WORD_SCALE)
        guider = w.node(
            "LGGuider", (1130, y), wide=240, model=load[0], positive=prompt[0], negative=negative[0], rules=rule[0]
        )
        assert common.sampler is not None
        decode = sample(
            w, 1420, y, load, guider[0], common.noise[0], common.sampler[0], common.sigmas[0], common.size[0]
        )
        pictures[title] = decode[0]
        w.group(title, [rule, guider, w.nodes[-2], decode])
    order = ("prompt", "second prompt", "negative", "Perp-Neg", "both")
    sheet(w, [(title, pictures[title]) for title in order], "compare_negatives")
    common.group(w)
    w.group("The second prompt", [second])


def classifier_forms(w: Workflow) -> None:
    """One label by the four forms of classifier guidance that papers and tutorials use."""
    w.note(
        f"## Four forms of classifier guidance\n\nThe same classifier, label and noise. *score* adds the gradient to the denoised estimate "
        "and works with every sampler; *eps* is the paper's Algorithm 2, with DDIM; *mean shift* is its Algorithm 1 and *post-step* the "
        "plainest tutorial form: these two act inside a DDPM step, so their rules go into the sampler.\n\nEach stands at a "
        f"`guidance_scale` that was measured on this model: *score* at {RAW_SCALE:g} (`scaling` *raw*, {RAW_STEPS} steps; fewer want "
        f"less), *eps*, which is the same push, there too, *mean shift* at {MEAN_SHIFT:g}, *post-step*, whose unit is its own, at "
        f"{POST_STEP:g}, the strongest tried.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese=f"相同的分类器、标签与噪声。*score* 把梯度加到去噪估计上，适用于任何采样器；*eps* 是论文的算法 2，用 DDIM；*mean "
        "shift* 是论文的算法 1，*post-step* 是教程中最简单的形式：这两种在 DDPM 步内起作用，所以规则连接到采样器。各自的 "
        f"`guidance_scale` 都在此模型上测过：*score* 为 {RAW_SCALE:g}（`scaling` 为 *raw*，{RAW_STEPS} 步；步数少则应小），"
        "*eps* 是同样的推动，故取同值；"
        f"*mean shift* 为 {MEAN_SHIFT:g}；*post-step* 的单位与众不同，取试过的最大值 {POST_STEP:g}。",
    )
    load = emoji(w, (0, 430))
    classifier = w.node("LGLoadClassifier", (0, 600), wide=300, classifier=CHECKPOINT)
    null = w.node("LGNullConditioning", (370, 74), title="No prompt", wide=320, clip=load[1])
    size = w.node("LGEmptyLatent", (370, 184), wide=320, batch_size=4)
    noise = w.node("LGSeededNoise", (370, 420), wide=320, seed=2, batch_size=4)
    sigmas = w.node(
        "BasicScheduler", (370, 580), wide=320, model=load[0], scheduler="karras", steps=RAW_STEPS, denoise=1.0
    )
    aim = {"classifier": classifier[0], "label": LABEL}
    forms = (
        ("score", "LGClassifierGuidance", RAW, "KSamplerSelect", {"sampler_name": "dpmpp_2m_sde"}),
        ("eps, DDIM", "LGClassifierGuidance", {**RAW, "form": "eps"}, "LGSamplerDDIM", {}),
        ("mean shift, DDPM", "LGClassifierMeanShift", {"guidance_scale": MEAN_SHIFT}, "LGSamplerDDPM", {}),
        ("post-step, DDPM", "LGClassifierPostStep", {"guidance_scale": POST_STEP}, "LGSamplerDDPM", {}),
    )
    pictures = []
    for row, (title, kind, settings, sampling, options) in enumerate(forms):
        y = 74 + row * 470.0
        rule = w.node(kind, (760, y), wide=320, **aim, **settings)
        inside = sampling == "LGSamplerDDPM"
        guider = w.node(
            "LGGuider", (1130, y), wide=240, model=load[0], positive=null[0], **({} if inside else {"rules": rule[0]})
        )
        sampler = w.node(sampling, (1130, y + 170), wide=240, **options, **({"rules": rule[0]} if inside else {}))
        decode = sample(w, 1420, y, load, guider[0], noise[0], sampler[0], sigmas[0], size[0])
        pictures.append((title, decode[0]))
        w.group(title, [rule, guider, sampler, w.nodes[-2], decode])
    sheet(w, pictures, "classifier_forms")
    w.group("Models", [load, classifier], color="#8A8")
    w.group("The same for all", [null, size, noise, sigmas], color="#b58b2a")


def from_parts(w: Workflow) -> None:
    """UNet, text encoder and VAE loaded one by one, so that each can be exchanged."""
    w.note(
        "## A model from its parts\n\nUNet, text encoder and VAE are loaded by themselves: exchange one for another folder's, for instance "
        "a decoder that you trained further. *Empty Latent (Any Ratio)* makes latents for any VAE.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese="UNet、文本编码器与 VAE 分别加载：可以把其中之一换成另一个文件夹的，例如你继续训练过的解码器。*Empty Latent (Any "
        "Ratio)* 可为任何 VAE 生成空潜变量。",
    )
    unet = w.node("LGLoadUNet", (0, 430), wide=300, checkpoint=CHECKPOINT)
    clip = w.node("LGLoadTextEncoder", (0, 580), wide=300, checkpoint=CHECKPOINT)
    vae = w.node("LGLoadVAE", (0, 730), wide=300, checkpoint=CHECKPOINT)
    prompt = w.node("LGTextEncode", (370, 74), title="Prompt", wide=320, clip=clip[0], text="person: red hair")
    null = w.node("LGNullConditioning", (370, 300), title="Negative: nothing said", wide=320, clip=clip[0])
    size = w.node("LGEmptyLatent", (370, 410), wide=320, batch_size=4)
    cfg = w.node("LGCFG", (760, 74), wide=280, guidance_scale=CFG_SCALE)
    guider = w.node("LGGuider", (760, 204), wide=280, model=unet[0], positive=prompt[0], negative=null[0], rules=cfg[0])
    noise = w.node("LGSeededNoise", (760, 370), wide=280, seed=1, batch_size=4)
    sampler = w.node("LGSamplerDDIM", (760, 530), wide=280, eta=0.0)
    below = 530 + sampler.size[1] + 60
    sigmas = w.node(
        "BasicScheduler", (760, below), wide=280, model=unet[0], scheduler="karras", steps=STEPS, denoise=1.0
    )
    run = w.node(
        "SamplerCustomAdvanced", (1110, 74), noise=noise[0], guider=guider[0], sampler=sampler[0], sigmas=sigmas[0],
        latent_image=size[0],
    )  # fmt: skip
    decode = w.node("LGVAEDecode", (1420, 74), wide=230, samples=run[0], vae=vae[0])
    save = w.node("SaveImage", (1110, 480), wide=540, tall=330, images=decode[0], filename_prefix="from_parts")
    w.group("Parts", [unet, clip, vae], color="#8A8")
    w.group("What to draw", [prompt, null, size])
    w.group("Sampling", [cfg, guider, noise, sampler, sigmas], color="#b58b2a")
    w.group("Pictures", [run, decode, save], color="#88A")


GRAPHS: dict[str, Callable[[Workflow], None]] = {
    graph.__name__: graph
    for graph in (compare_rules, compare_more_rules, compare_weakened, compare_negatives, classifier_forms, from_parts)
}
