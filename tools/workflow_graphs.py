"""The first example workflows, as they are built: what is in each, and where it stands on the canvas."""

from __future__ import annotations

from collections.abc import Callable

from workflow_builder import Output, Workflow
from workflow_parts import CFG_SCALE, CHECKPOINT, CLASSIFIER_SCALE, STEPS, WORD_SCALE
from workflow_parts import emoji as _load
from workflow_parts import empty as _empty
from workflow_parts import sample as _sample


def quickstart(w: Workflow) -> None:
    """A prompt and classifier-free guidance; after the loader and the negative nothing but core nodes."""
    w.note(
        "## Quickstart\n\nPress **Run**. The emoji model comes with the pack; nothing is downloaded.\n\n"
        "Type the name of an emoji into *Prompt*: `cat face`, `person`, `flag: France`. The model knows its names by heart, so that "
        f"seeds differ little. `cfg` is the guidance scale: {CFG_SCALE:g} is enough for names; other words (`orange car`) may come clearer "
        f"at {WORD_SCALE:g}.\n\n"
        "All nodes after the loader but the negative are ComfyUI's own: the model is an ordinary MODEL.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese="按 **运行**。emoji 模型随节点包自带，无需下载。在 *Prompt* 中输入 emoji 的英文名，如 `cat face`、`person`、"
        "`flag: France`。"
        f"模型熟记这些名称，因此不同种子相差不大。`cfg` 是引导强度：对这些名称 {CFG_SCALE:g} 即可，其他词语（`orange car`）在 "
        f"{WORD_SCALE:g} 时可能更清楚。"
        "加载器之后除反向条件外都是 ComfyUI 自己的节点：这个模"
        "型就是普通的 MODEL。",
    )
    load = _load(w, (0, 430))
    prompt = w.node("CLIPTextEncode", (370, 74), title="Prompt", wide=320, clip=load[1], text="grinning face")
    null = w.node("LGNullConditioning", (370, 300), title="Negative: nothing said", wide=320, clip=load[1])
    size = _empty(w, (370, 410), 4)
    sampler = w.node(
        "KSampler", (760, 74), wide=280, model=load[0], positive=prompt[0], negative=null[0], latent_image=size[0],
        seed=1, steps=STEPS, cfg=CFG_SCALE, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0,
    )  # fmt: skip
    decode = w.node("VAEDecode", (1110, 74), wide=210, samples=sampler[0], vae=load[2])
    save = w.node("SaveImage", (1110, 190), wide=420, tall=380, images=decode[0], filename_prefix="quickstart")
    w.group("Model", [load], color="#8A8")
    w.group("What to draw", [prompt, null, size])
    w.group("Sampling", [sampler], color="#b58b2a")
    w.group("Pictures", [decode, save], color="#88A")


def classifier_guidance(w: Workflow) -> None:
    """An empty prompt and a label of the noisy-latent classifier."""
    w.note(
        "## Classifier guidance\n\nThe prompt is empty. What steers the picture is the gradient of a small classifier that "
        "reads the noisy latents. Its labels are the groups of emoji: `Smileys & Emotion`, `People & Body`, `Animals & Nature`, "
        "`Food & Drink`, `Travel & Places`, `Activities`, `Objects`, `Symbols`, `Flags`. Try also `not Flags`, or "
        "`Symbols:2, Objects`.\n\n`guidance_scale` 0 is off, more is clearer and less varied up to a point; "
        "in the unit *relative* it suits any classifier. "
        "Samplers that add noise at each step, such as `dpmpp_2m_sde`, draw cleaner pictures from an empty prompt.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese="提示词为空，引导画面的是一个读取带噪潜变量的小分类器的梯度。它的标签是 emoji 的九个类别（见上文英文名），也可试 "
        "`not Flags` 或 `Symbols:2, Objects`。`guidance_scale` 0 关闭，在一定范围内越大越明确、多样性越低；"
        "以 relative 为单位时适用于任何分类器。"
        "提示词为空时，每步加噪的采样器（如 `dpmpp_2m_sde`）画得更干净。",
    )
    load = _load(w, (0, 430))
    classifier = w.node("LGLoadClassifier", (0, 600), wide=300, classifier=CHECKPOINT)
    null = w.node("LGNullConditioning", (370, 74), title="No prompt", wide=320, clip=load[1])
    size = _empty(w, (370, 184), 8)
    rule = w.node(
        "LGClassifierGuidance",
        (370, 400),
        wide=320,
        classifier=classifier[0],
        label=LABEL,
        guidance_scale=CLASSIFIER_SCALE,
    )
    guider = w.node("LGGuider", (760, 74), wide=280, model=load[0], positive=null[0], rules=rule[0])
    noise = w.node("LGSeededNoise", (760, 230), wide=280, seed=1, batch_size=8)
    sampler = w.node("KSamplerSelect", (760, 390), wide=280, sampler_name="dpmpp_2m_sde")
    sigmas = w.node("BasicScheduler", (760, 500), wide=280, model=load[0], scheduler="karras", steps=STEPS, denoise=1.0)
    decode = _sample(w, 1110, 74, load, guider[0], noise[0], sampler[0], sigmas[0], size[0])
    save = w.node("SaveImage", (1110, 480), wide=520, tall=330, images=decode[0], filename_prefix="classifier_guidance")
    probe = w.node("LGClassProbabilities", (1710, 74), wide=300, classifier=classifier[0], image=decode[0], vae=load[2])
    chart = w.node("PreviewImage", (1710, 270), wide=440, tall=330, title="What the classifier sees", images=probe[0])
    w.group("Models", [load, classifier], color="#8A8")
    w.group("What to draw", [null, size, rule])
    w.group("Sampling", [guider, noise, sampler, sigmas], color="#b58b2a")
    w.group("Pictures", [decode, save, w.nodes[-4]], color="#88A")
    w.group("A look inside", [probe, chart], color="#a1309b")


def cfg_plus_classifier(w: Workflow) -> None:
    """A prompt with classifier-free guidance in a limited interval, and the classifier on top."""
    w.note(
        "## Two guidances at once\n\nA chain of rules: classifier-free guidance makes the prompt clear, only at middle noise "
        "levels (*Limited Interval*), and the classifier pushes towards a group of emoji at the same time: the prompt says `blue`, "
        f"the classifier wants `Flags`, and out come flags, some of them blue. `blue` is no emoji's name, so CFG is at {WORD_SCALE:g}; "
        f"names do with {CFG_SCALE:g}. Set the classifier's `guidance_scale` to 0 to see what the prompt alone draws.\n\nThe order of the "
        "chain does not matter here: rules act by stage.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese="一条规则链：无分类器引导使提示词清晰，只在中间的噪声水平起作用（*Limited Interval*，限定区间）；分类器同时把画面"
        "推向一类 emoji：提示词只说 `blue`（蓝），分类器要的是旗帜，画出的便是旗帜，其中一些是蓝色的。"
        f"`blue` 不是 emoji 的名称，因此 CFG 取 {WORD_SCALE:g}；名称用 {CFG_SCALE:g} 即可。"
        "把分类器的 `guidance_scale` 设为 0 "
        "即可看到只有提示词时的结果。链中的顺序在这里无关紧要：规则按阶段起作用。",
    )
    load = _load(w, (0, 430))
    classifier = w.node("LGLoadClassifier", (0, 600), wide=300, classifier=CHECKPOINT)
    prompt = w.node("LGTextEncode", (370, 74), title="Prompt", wide=320, clip=load[1], text="blue")
    null = w.node("LGNullConditioning", (370, 300), title="Negative: nothing said", wide=320, clip=load[1])
    size = _empty(w, (370, 410), 8)
    cfg = w.node("LGCFG", (760, 74), wide=320, guidance_scale=WORD_SCALE)
    interval = w.node("LGLimitedInterval", (760, 200), wide=320, sigma_lo=0.28, sigma_hi=5.42, rules=cfg[0])
    rule = w.node(
        "LGClassifierGuidance", (760, 350), wide=320, classifier=classifier[0], label=LABEL, guidance_scale=CLASSIFIER_SCALE,
        rules=interval[0],
    )  # fmt: skip
    guider = w.node(
        "LGGuider", (1150, 74), wide=280, model=load[0], positive=prompt[0], negative=null[0], rules=rule[0]
    )
    noise = w.node("LGSeededNoise", (1150, 230), wide=280, seed=5, batch_size=8)
    sampler = w.node("KSamplerSelect", (1150, 390), wide=280, sampler_name="dpmpp_2m")
    sigmas = w.node(
        "BasicScheduler", (1150, 500), wide=280, model=load[0], scheduler="karras", steps=STEPS, denoise=1.0
    )
    decode = _sample(w, 1500, 74, load, guider[0], noise[0], sampler[0], sigmas[0], size[0])
    save = w.node("SaveImage", (1500, 480), wide=520, tall=330, images=decode[0], filename_prefix="cfg_plus_classifier")
    w.group("Models", [load, classifier], color="#8A8")
    w.group("What to draw", [prompt, null, size])
    w.group("Rules", [cfg, interval, rule], color="#a1309b")
    w.group("Sampling", [guider, noise, sampler, sigmas], color="#b58b2a")
    w.group("Pictures", [decode, save, w.nodes[-3]], color="#88A")


def image_to_image(w: Workflow) -> None:
    """A picture made inside the graph, encoded, partly noised and drawn again under another prompt."""
    w.note(
        "## Image to image\n\nThe first sampler draws pictures, so that the example needs no file; put a *Load Image* in its "
        "place for one of your own (sides in multiples of 8).\n\n*VAE Encode (Posterior)* turns it into latents, and the second sampler "
        "starts from them with part of the noise: `denoise` 0.5 keeps nearly all, 1 keeps nothing.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese="第一个采样器先画出图片，因此示例不需要文件；要用自己的图片，可换成“加载图像”节点（边长须为 8 的倍数）。*VAE "
        "Encode (Posterior)* 把它编码为潜变量，第二个采样器在加入部分噪声后从它开始：`denoise` 0.5 几乎全部保留，1 则什么"
        "都不保留。",
    )
    load = _load(w, (0, 430))
    null = w.node("LGNullConditioning", (0, 600), title="Negative: nothing said", wide=300, clip=load[1])
    first = w.node(
        "CLIPTextEncode", (370, 74), title="First picture", wide=320, text_height=60, clip=load[1], text="grinning face"
    )
    size = _empty(w, (370, 224), 3)
    draw = w.node(
        "KSampler", (370, 392), wide=320, model=load[0], positive=first[0], negative=null[0], latent_image=size[0],
        seed=3, steps=STEPS, cfg=CFG_SCALE, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0,
    )  # fmt: skip
    source = w.node("VAEDecode", (370, 940), wide=320, samples=draw[0], vae=load[2])
    encode = w.node("LGVAEEncode", (760, 74), wide=320, image=source[0], vae=load[2], posterior="mode", seed=0)
    second = w.node(
        "CLIPTextEncode", (760, 250), title="Second picture", wide=320, text_height=60, clip=load[1], text="person"
    )
    change = w.node(
        "KSampler", (760, 392), wide=320, model=load[0], positive=second[0], negative=null[0], latent_image=encode[0],
        seed=4, steps=STEPS, cfg=CFG_SCALE, sampler_name="dpmpp_2m", scheduler="karras", denoise=0.8,
    )  # fmt: skip
    result = w.node("VAEDecode", (760, 940), wide=320, samples=change[0], vae=load[2])
    grid = w.node(
        "LGPictureGrid", (1150, 74), wide=320, text_height=80, images=source[0], images_2=result[0],
        labels="before\nafter", columns=2, gap=8,
    )  # fmt: skip
    save = w.node("SaveImage", (1150, 480), wide=420, tall=456, images=grid[0], filename_prefix="image_to_image")
    w.group("Model", [load, null], color="#8A8")
    w.group("Make a picture", [first, size, draw, source])
    w.group("Change it", [encode, second, change, result], color="#b58b2a")
    w.group("Before and after", [grid, save], color="#88A")


def compare_scales(w: Workflow) -> None:
    """One label, the same noise, five guidance scales, in one labelled sheet."""
    w.note(
        "## Compare guidance scales\n\nThe same four noises under five guidance scales of the classifier. Every column differs "
        f"from its neighbour in `guidance_scale` alone; {CLASSIFIER_SCALE:g} is recommended.\n\nAt 0 the model draws what it likes; a "
        "little "
        "more and some pictures show the label; further up nearly all do; far above that they grow coarse and muddy.",
        (0, 0),
        (300, 300),
        title="About this workflow",
        chinese="相同的四份噪声、分类器的五种引导强度，相邻两列只有 `guidance_scale` 不同，"
        f"推荐 {CLASSIFIER_SCALE:g}。"
        "强度为 0 时模型自由发挥；稍强时部"
        "分图片显出该标签；再往上几乎全部显出；高出太多时画面变得粗糙浑浊。",
    )
    load = _load(w, (0, 430))
    classifier = w.node("LGLoadClassifier", (0, 600), wide=300, classifier=CHECKPOINT)
    null = w.node("LGNullConditioning", (370, 74), title="No prompt", wide=300, clip=load[1])
    size = _empty(w, (370, 184), 4)
    noise = w.node("LGSeededNoise", (370, 390), wide=320, seed=1, batch_size=4)
    sampler = w.node("KSamplerSelect", (370, 550), wide=320, sampler_name="dpmpp_2m_sde")
    sigmas = w.node("BasicScheduler", (370, 660), wide=320, model=load[0], scheduler="karras", steps=STEPS, denoise=1.0)
    pictures: list[Output] = []
    for row, scale in enumerate(SCALES):
        y = 74 + row * 400
        rule = w.node(
            "LGClassifierGuidance", (760, y), title=f"Scale {scale:g}", wide=320, classifier=classifier[0], label=LABEL,
            guidance_scale=scale,
        )  # fmt: skip
        guider = w.node("LGGuider", (1130, y), wide=240, model=load[0], positive=null[0], rules=rule[0])
        decode = _sample(w, 1420, y, load, guider[0], noise[0], sampler[0], sigmas[0], size[0])
        pictures.append(decode[0])
        w.group(f"Scale {scale:g}", [rule, guider, w.nodes[-2], decode])
    more = {f"images_{i}": picture for i, picture in enumerate(pictures[1:], start=2)}
    labels = "\n".join(["unguided", *(f"scale {scale:g}" for scale in SCALES[1:])])
    grid = w.node(
        "LGPictureGrid", (2030, 74), wide=340, text_height=120, images=pictures[0], **more,
        labels=labels, columns=len(SCALES), gap=8,
    )  # fmt: skip
    save = w.node("SaveImage", (2030, 520), wide=640, tall=560, images=grid[0], filename_prefix="compare_scales")
    w.group("Models", [load, classifier], color="#8A8")
    w.group("The same for all", [null, size, noise, sampler, sigmas], color="#b58b2a")
    w.group("The sheet", [grid, save], color="#88A")


LABEL = "Flags"
SCALES = (0.0, 0.05, 0.1, CLASSIFIER_SCALE, 0.8)

GRAPHS: dict[str, Callable[[Workflow], None]] = {
    graph.__name__: graph
    for graph in (
        quickstart,
        classifier_guidance,
        cfg_plus_classifier,
        image_to_image,
        compare_scales,
    )
}
