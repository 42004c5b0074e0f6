"""Example workflows for the checkpoints that people have: SD 1.5 and SDXL. They need that file and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from core_nodes import MODELS
from workflow_builder import Node, Workflow
from workflow_parts import STEPS, Chain, columns, sample, shared, sheet

SD15, SDXL, TUNED, SD3 = MODELS
NEGATIVE = "blurry, low quality, watermark"
PROMPT = "a fox in a snowy forest at sunrise, detailed photograph"


def load_own(w: Workflow, name: str, at: tuple[float, float] = (0, 430)) -> Node:
    """The loader of the user's own checkpoint, with where ``name`` can be had."""
    node = w.node("CheckpointLoaderSimple", at, wide=300, ckpt_name=name)
    node.models = [{"name": name, "url": MODELS[name] + name, "directory": "checkpoints"}]
    return node


def about(w: Workflow, title: str, kind: str, text: str, chinese: str) -> None:
    """The note that says which checkpoint is needed, in both languages."""
    w.note(
        f"## {title}\n\nChoose your **{kind}** checkpoint in *Load Checkpoint* (any one will do) and press **Run**.\n\n{text}",
        (0, 0),
        (300, 340),
        title="About this workflow",
        chinese=f"在“加载检查点”(*Load Checkpoint*) 中选择你的 **{kind}** 检查点（任何一个都可以），然后按 **运行**。\n\n{chinese}",
    )


def compare(
    w: Workflow, strong: float, chains: list[tuple[str, Chain]], *, negative: str | None = NEGATIVE, tall: float = 400.0
) -> None:
    """One picture per chain of rules, the same prompt, negative and seed, as a labelled sheet."""
    common = shared(w, load_own(w, SD15), PROMPT, negative=negative, batch=1, side=512)
    cfg: Chain = (("LGCFG", {"guidance_scale": strong}),)
    first: list[tuple[str, Chain]] = [(f"CFG {strong:g}", cfg)]
    sheet(w, columns(w, common, first + chains, tall=tall), w.name)
    common.group(w)


def sd15_scale_rules(w: Workflow) -> None:
    """Rules that change how strong the guidance is along the way."""
    about(
        w,
        "How strong, and when",
        "SD 1.5",
        "One prompt and seed; each picture has one rule that changes the guidance scale along the way: only at middle noise levels, "
        "rising, by a curve, less where it would overshoot, or not at all once prompt and negative agree.",
        "同一提示词与种子；每张图片有一条沿途改变引导强度的规则：只在中间的噪声水平、逐渐增强、按曲线、在会过冲处减弱，或"
        "在正反向一致后完全停止。",
    )
    cfg = ("LGCFG", {"guidance_scale": 9.0})
    compare(
        w,
        9.0,
        [
            ("interval", [cfg, ("LGLimitedInterval", {})]),
            ("schedule", [cfg, ("LGGuidanceSchedule", {})]),
            ("curve", [cfg, ("LGGuidanceCurve", {"curve": "14:2, 5:9, 1:9, 0.3:3"})]),
            ("magnitude", [cfg, ("LGMagnitudeAware", {})]),
            ("adaptive", [cfg, ("LGAdaptiveGuidance", {})]),
        ],
    )


def sd15_direction_rules(w: Workflow) -> None:
    """Rules that change which way the guidance points."""
    about(
        w,
        "Which way the guidance points",
        "SD 1.5",
        "One prompt and seed at a strong scale; each picture has one rule that changes the difference between prompt and negative "
        "before it is scaled, or how the two meet: projected, tangential, sliding mode, CFG-Zero*, by frequencies.",
        "同一提示词与种子，强引导；每张图片有一条规则，在乘以强度之前改变正反向之差，或改变两者如何结合：投影、切向、滑模、"
        "CFG-Zero*、按频率。",
    )
    cfg = ("LGCFG", {"guidance_scale": 12.0})
    compare(
        w,
        12.0,
        [
            ("projected", [cfg, ("LGAdaptiveProjectedGuidance", {"norm_threshold": 15.0})]),
            ("tangential", [cfg, ("LGTangentialCFG", {})]),
            ("sliding mode", [cfg, ("LGSlidingModeCFG", {})]),
            ("CFG-Zero*", [("LGCFGZeroStar", {"guidance_scale": 12.0})]),
            ("frequencies", [("LGFrequencyDecoupled", {"scale_low": 5.0, "scale_high": 12.0})]),
        ],
    )


def sd15_contrast_rules(w: Workflow) -> None:
    """Rules against burnt colours, which act on the guided estimate."""
    about(
        w,
        "Against burnt colours",
        "SD 1.5",
        "One prompt and seed at a scale that burns; each picture has one rule that acts on the guided estimate: rescaled to the spread of "
        "the plain one, thresholded to its range, pushed away from its own past.",
        "同一提示词与种子，强度大到颜色过饱和；每张图片有一条作用于引导后估计的规则：重缩放到普通估计的离散程度、按其范围"
        "取阈值、远离自己的过去。",
    )
    cfg = ("LGCFG", {"guidance_scale": 15.0})
    compare(
        w,
        15.0,
        [
            ("rescaled", [cfg, ("LGRescaleGuidance", {})]),
            ("thresholded", [cfg, ("LGDynamicThresholding", {})]),
            ("momentum", [("LGCFG", {"guidance_scale": 5.0}), ("LGMomentumGuidance", {})]),
        ],
    )


def sd15_two_prompts(w: Workflow) -> None:
    """What a second prompt can do: Perp-Neg, and two conditions."""
    about(
        w,
        "Two prompts",
        "SD 1.5",
        "*Perp-Neg* takes away only what the second prompt does not share with the first; *both* asks for the two at once, with a scale "
        "for each.",
        "*Perp-Neg* 只去掉第二个提示词与第一个不重合的部分；*both* 同时要求两者，各有强度。",
    )
    load = load_own(w, SD15)
    second = w.node(
        "LGTextEncode",
        (0, 650),
        title="Second prompt",
        wide=300,
        text_height=60,
        clip=load[1],
        text="a snow storm at night",
    )
    common = shared(w, load, PROMPT, batch=1, side=512)
    chains: list[tuple[str, Chain]] = [
        ("CFG 7.5", [("LGCFG", {"guidance_scale": 7.5})]),
        ("Perp-Neg", [("LGPerpNeg", {"negative": second[0]})]),
        (
            "both",
            [("LGTwoConditions", {"condition": second[0], "first_scale": 3.0, "second_scale": 7.5, "form": "sum"})],
        ),
    ]
    sheet(w, columns(w, common, chains), "sd15_two_prompts")
    common.group(w)
    w.group("To compare with", [second])


def sd15_autoguidance(w: Workflow) -> None:
    """A fine-tune guided away from the model that it was made from."""
    about(
        w,
        "A model and a weaker one",
        "SD 1.5",
        "This one needs two checkpoints: a fine-tune above, and the model that it was made from below. *Autoguidance* goes from the weaker "
        "one's estimate past the better one's; it needs no negative, and takes as long as CFG. Both are in memory at once.",
        "这个示例需要两个检查点：上面是微调模型，下面是它所基于的模型。*Autoguidance* 从较弱模型的估计出发，越过较好模型"
        "的估计；不需要反向条件，用时与 CFG 相同。两个模型同时在内存中。",
    )
    load = load_own(w, TUNED)
    weak = load_own(w, SD15, (0, 620))
    weak.title = "Load Checkpoint: the weaker one"
    common = shared(w, load, PROMPT, batch=1, side=512)
    chains: list[tuple[str, Chain]] = [
        ("the prompt alone", [("LGCFG", {"guidance_scale": 1.0})]),
        ("CFG 7.5", [("LGCFG", {"guidance_scale": 7.5})]),
        ("autoguidance", [("LGAutoguidance", {"weak_model": weak[0]})]),
    ]
    sheet(w, columns(w, common, chains), "sd15_autoguidance")
    common.group(w)
    w.group("To compare with", [weak])


def _on_model(w: Workflow, name: str, side: int, scale: float) -> None:
    """Rules on the MODEL, then KSampler as ever."""
    load = load_own(w, name)
    prompt = w.node("CLIPTextEncode", (370, 74), title="Prompt", wide=320, clip=load[1], text=PROMPT)
    negative = w.node(
        "CLIPTextEncode", (370, 290), title="Negative", wide=320, text_height=60, clip=load[1], text=NEGATIVE
    )
    size = w.node("EmptyLatentImage", (370, 464), wide=320, width=side, height=side, batch_size=1)
    interval = w.node("LGLimitedInterval", (760, 74), wide=320)
    projected = w.node("LGAdaptiveProjectedGuidance", (760, 240), wide=320, norm_threshold=15.0, rules=interval[0])
    rescaled = w.node("LGRescaleGuidance", (760, 430), wide=320, phi=0.3, rules=projected[0])
    patch = w.node("LGApplyGuidance", (760, 570), wide=320, model=load[0], rules=rescaled[0])
    sampler = w.node(
        "KSampler", (1150, 74), wide=280, model=patch[0], positive=prompt[0], negative=negative[0], latent_image=size[0],
        seed=1, steps=STEPS, cfg=scale, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0,
    )  # fmt: skip
    decode = w.node("VAEDecode", (1150, 640), wide=280, samples=sampler[0], vae=load[2])
    save = w.node("SaveImage", (1490, 74), wide=520, tall=520, images=decode[0], filename_prefix=w.name)
    w.group("Model", [load], color="#8A8")
    w.group("What to draw", [prompt, negative, size])
    w.group("Rules on the model", [interval, projected, rescaled, patch], color="#a1309b")
    w.group("Sampling", [sampler, decode], color="#b58b2a")
    w.group("Picture", [save], color="#88A")


def sd15_ksampler(w: Workflow) -> None:
    """Rules put onto the MODEL, under KSampler."""
    about(
        w,
        "Rules under KSampler",
        "SD 1.5",
        "*Apply Guidance to Model* puts a chain of rules onto the model; KSampler, its `cfg` and everything else stay as they were. The "
        "interval keeps guidance to the middle noise levels, the projection and the rescaling keep colours from burning. Bypass the "
        "purple nodes to compare.",
        "*Apply Guidance to Model*（将引导应用于模型）把规则链加到模型上；KSampler、它的 `cfg` 以及其他一切保持原样。区间"
        "把引导限制在中间的噪声水平，投影与重缩放防止颜色过饱和。绕过紫色节点即可比较。",
    )
    _on_model(w, SD15, 512, 9.0)


def sdxl_ksampler(w: Workflow) -> None:
    """The same for SDXL."""
    about(
        w,
        "Rules under KSampler",
        "SDXL",
        "*Apply Guidance to Model* puts a chain of rules onto the model; KSampler, its `cfg` and everything else stay as they were. The "
        "interval keeps guidance to the middle noise levels, the projection and the rescaling keep colours from burning. Bypass the "
        "purple nodes to compare.",
        "*Apply Guidance to Model*（将引导应用于模型）把规则链加到模型上；KSampler、它的 `cfg` 以及其他一切保持原样。区间"
        "把引导限制在中间的噪声水平，投影与重缩放防止颜色过饱和。绕过紫色节点即可比较。",
    )
    _on_model(w, SDXL, 1024, 8.0)


def sdxl_guider(w: Workflow) -> None:
    """A chain of rules in the Guider, for SDXL."""
    about(
        w,
        "Rules in a guider",
        "SDXL",
        "*Guider* takes the place of *CFGGuider*: the chain of rules before it says how the model is guided. CFG in a limited interval, "
        "projected so that it does not burn. Outside the interval the negative is not evaluated, which saves time.",
        "*Guider*（引导器）取代 *CFGGuider*：它前面的规则链决定如何引导模型。这里是限定区间内的 CFG，加上投影以防颜色过饱"
        "和。区间之外不计算反向条件，节省时间。",
    )
    load = load_own(w, SDXL)
    prompt = w.node("CLIPTextEncode", (370, 74), title="Prompt", wide=320, clip=load[1], text=PROMPT)
    negative = w.node(
        "CLIPTextEncode", (370, 290), title="Negative", wide=320, text_height=60, clip=load[1], text=NEGATIVE
    )
    size = w.node("EmptyLatentImage", (370, 464), wide=320, width=1024, height=1024, batch_size=1)
    cfg = w.node("LGCFG", (760, 74), wide=320, guidance_scale=8.0)
    interval = w.node("LGLimitedInterval", (760, 204), wide=320, rules=cfg[0])
    projected = w.node("LGAdaptiveProjectedGuidance", (760, 370), wide=320, norm_threshold=15.0, rules=interval[0])
    guider = w.node(
        "LGGuider", (1150, 74), wide=280, model=load[0], positive=prompt[0], negative=negative[0], rules=projected[0]
    )
    noise = w.node("LGSeededNoise", (1150, 240), wide=280, seed=1, batch_size=1)
    sampler = w.node("KSamplerSelect", (1150, 400), wide=280, sampler_name="dpmpp_2m")
    sigmas = w.node(
        "BasicScheduler", (1150, 510), wide=280, model=load[0], scheduler="karras", steps=STEPS, denoise=1.0
    )
    decode = sample(w, 1500, 74, load, guider[0], noise[0], sampler[0], sigmas[0], size[0])
    save = w.node("SaveImage", (1500, 480), wide=520, tall=520, images=decode[0], filename_prefix=w.name)
    w.group("Model", [load], color="#8A8")
    w.group("What to draw", [prompt, negative, size])
    w.group("Rules", [cfg, interval, projected], color="#a1309b")
    w.group("Sampling", [guider, noise, sampler, sigmas], color="#b58b2a")
    w.group("Picture", [w.nodes[-3], decode, save], color="#88A")


GRAPHS: dict[str, Callable[[Workflow], None]] = {
    graph.__name__: graph
    for graph in (
        sd15_scale_rules,
        sd15_direction_rules,
        sd15_contrast_rules,
        sd15_two_prompts,
        sd15_autoguidance,
        sd15_ksampler,
        sdxl_guider,
        sdxl_ksampler,
    )
}
