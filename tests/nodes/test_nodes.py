"""Every node runs, on the embedded runtime, in inference mode as ComfyUI runs nodes; bad input is refused with words."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from latent_guidance.errors import UserError

Nodes = dict[str, type]
STEPS = 4


@pytest.fixture(autouse=True)
def as_a_node() -> Any:
    with torch.inference_mode():
        yield


def call(nodes: Nodes, node_id: str, **inputs: Any) -> Any:
    """What a node answers, with the defaults of its schema where nothing is given."""
    node: Any = nodes[node_id]
    required = node.INPUT_TYPES().get("required", {})
    defaults = {name: spec[1]["default"] for name, spec in required.items() if len(spec) > 1 and "default" in spec[1]}
    return getattr(node(), node.FUNCTION)(**(defaults | inputs))


def everything(nodes: Nodes) -> dict[str, Any]:
    model, clip, vae = call(nodes, "LGLoadCheckpoint", checkpoint="tiny")
    (classifier, labels) = call(nodes, "LGLoadClassifier", classifier="tiny")
    (positive,) = call(nodes, "LGTextEncode", clip=clip, text="a (red:1.2) apple")
    (negative,) = call(nodes, "LGNullConditioning", clip=clip)
    return dict(locals()) | {"nodes": nodes}


def sample(
    things: dict[str, Any],
    *,
    rules: Any = None,
    model: Any = None,
    sampler: Any = None,
    batch: int = 1,
    seed: int = 3,
    report: bool = False,
) -> torch.Tensor:
    """Latents (B, 4, 8, 8) drawn with the pack's guider and noise."""
    from latent_guidance.host import stock

    nodes = things["nodes"]
    host = stock.NODE_CLASS_MAPPINGS
    model = things["model"] if model is None else model
    inputs = dict(positive=things["positive"], negative=things["negative"], rules=rules, report=report)
    guider, _ = call(nodes, "LGGuider", model=model, **inputs)
    (noise,) = call(nodes, "LGSeededNoise", seed=seed, batch_size=batch)
    (latent,) = call(nodes, "LGEmptyLatent", width=64, height=64, batch_size=batch)
    sampler = call(host, "KSamplerSelect", sampler_name="euler")[0] if sampler is None else sampler
    (sigmas,) = call(host, "BasicScheduler", model=model, scheduler="karras", steps=STEPS, denoise=1.0)
    result = call(
        host, "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )
    return result[0]["samples"]


def guide(things: dict[str, Any], label: str, scale: float = 60.0, rules: Any = (), **more: Any) -> Any:
    inputs = dict(classifier=things["classifier"], label=label, guidance_scale=scale, scaling="raw", rules=rules)
    return call(things["nodes"], "LGClassifierGuidance", **inputs, **more)[0]


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / first.std())


def test_loaders_give_usable_parts(embedded: Nodes) -> None:
    things = everything(embedded)
    assert things["labels"].splitlines()[-1] == "Flags"
    (vae,) = call(embedded, "LGLoadVAE", checkpoint="tiny")
    (clip,) = call(embedded, "LGLoadTextEncoder", checkpoint="tiny")
    (model,) = call(embedded, "LGLoadUNet", checkpoint="tiny")
    (positive,) = call(embedded, "LGTextEncode", clip=clip, text="a (red:1.2) apple")
    assert torch.equal(positive[0][0], things["positive"][0][0])
    alone = sample(things, model=model)
    assert torch.equal(alone, sample(things))
    (image,) = call(embedded, "LGVAEDecode", samples={"samples": alone}, vae=vae)
    assert image.shape == (1, 64, 64, 3) and float(image.min()) >= 0 and float(image.max()) <= 1


def test_combos_list_what_is_there(embedded: Nodes) -> None:
    for node_id in ("LGLoadCheckpoint", "LGLoadVAE", "LGLoadTextEncoder", "LGLoadUNet"):
        node: Any = embedded[node_id]
        assert "tiny" in node.INPUT_TYPES()["required"]["checkpoint"][0]
    classifiers: Any = embedded["LGLoadClassifier"]
    assert "tiny" in classifiers.INPUT_TYPES()["required"]["classifier"][0]


def test_null_conditioning_is_the_empty_prompt(embedded: Nodes) -> None:
    from latent_guidance.host import stock

    things = everything(embedded)
    (stock_empty,) = call(stock.NODE_CLASS_MAPPINGS, "CLIPTextEncode", clip=things["clip"], text="")
    (null,) = call(embedded, "LGNullConditioning", clip=things["clip"])
    assert torch.equal(null[0][0], stock_empty[0][0])
    assert torch.equal(null[0][1]["pooled_output"], stock_empty[0][1]["pooled_output"])
    assert not torch.equal(null[0][0], things["positive"][0][0])


def test_vae_encode_takes_mode_or_a_seeded_sample(embedded: Nodes) -> None:
    vae, image = everything(embedded)["vae"], torch.rand(2, 64, 48, 3)

    def encode(posterior: str, seed: int, picture: torch.Tensor = image) -> torch.Tensor:
        return call(embedded, "LGVAEEncode", image=picture, vae=vae, posterior=posterior, seed=seed)[0]["samples"]

    assert encode("mode", 0).shape == (2, 4, 8, 6)
    assert torch.equal(encode("mode", 0), encode("mode", 1))
    assert torch.equal(encode("sample", 7), encode("sample", 7))
    assert not torch.equal(encode("sample", 7), encode("sample", 8))
    assert torch.allclose(encode("sample", 7)[1:], encode("sample", 8, image[1:]), atol=1e-5)  # item i has seed + i


def test_two_rules_in_a_chain_both_act(embedded: Nodes) -> None:
    things = everything(embedded)
    plain, first = sample(things), sample(things, rules=guide(things, "Flags"))
    second = sample(things, rules=guide(things, "Food & Drink"))
    both = sample(things, rules=guide(things, "Food & Drink", rules=guide(things, "Flags")))
    pictures = [plain, first, second, both]
    assert all(apart(a, b) > 1e-2 for i, a in enumerate(pictures) for b in pictures[i + 1 :])
    assert torch.equal(both, sample(things, rules=guide(things, "Food & Drink", rules=guide(things, "Flags"))))


def test_noisy_clip_steers_towards_a_text(embedded: Nodes) -> None:
    things = everything(embedded)
    (noisy_clip,) = call(embedded, "LGLoadNoisyCLIP", noisy_clip="tiny")
    inputs = dict(noisy_clip=noisy_clip, guidance_scale=40.0)
    (rules,) = call(embedded, "LGNoisyCLIPGuidance", target=things["positive"], **inputs)
    guided = sample(things, rules=rules)
    assert apart(sample(things), guided) > 1e-2 and torch.equal(guided, sample(things, rules=rules))
    (patched,) = call(embedded, "LGApplyGuidance", model=things["model"], rules=rules)
    assert apart(guided, sample(things, model=patched)) <= 1e-5
    (opposite,) = call(embedded, "LGNoisyCLIPGuidance", target=things["negative"], away=things["positive"], **inputs)
    assert apart(guided, sample(things, rules=opposite)) > 1e-2
    with pytest.raises(UserError, match="start token"):
        call(embedded, "LGNoisyCLIPGuidance", target=[[things["positive"][0][0] + 1.0, {}]], **inputs)


def test_guider_and_patch_agree(embedded: Nodes) -> None:
    things = everything(embedded)
    rules = guide(things, "Flags", rules=call(embedded, "LGCFG", guidance_scale=3.0)[0])
    (patched,) = call(embedded, "LGApplyGuidance", model=things["model"], rules=rules)
    assert apart(sample(things, rules=rules), sample(things, model=patched)) <= 1e-5
    assert apart(sample(things), sample(things, model=patched)) > 1e-2


def test_neutral_rules_change_nothing(embedded: Nodes) -> None:
    things = everything(embedded)
    rules = guide(things, "Flags", 0.0, rules=call(embedded, "LGCFG", guidance_scale=1.0)[0])
    assert torch.equal(sample(things), sample(things, rules=rules))


def test_samplers_of_the_pack(embedded: Nodes) -> None:
    things = everything(embedded)
    (ddim,) = call(embedded, "LGSamplerDDIM", eta=0.0)
    (random,) = call(embedded, "LGSamplerDDIM", eta=1.0)
    assert apart(sample(things), sample(things, sampler=ddim)) <= 1e-4
    assert apart(sample(things), sample(things, sampler=random)) > 1e-2
    (shift,) = call(
        embedded, "LGClassifierMeanShift", classifier=things["classifier"], label="Flags", guidance_scale=20.0
    )
    (plain,) = call(embedded, "LGSamplerDDPM", variance="beta")
    (guided,) = call(embedded, "LGSamplerDDPM", variance="beta", rules=shift)
    assert apart(sample(things, sampler=plain), sample(things, sampler=guided)) > 1e-2


@pytest.mark.parametrize(
    ("node_id", "inputs"),
    [
        ("LGSamplerDDPM", {"variance": "beta_tilde"}),
        ("LGSamplerDDIM", {"recurrence": 2}),
        ("LGSamplerDDIMCFGpp", {"eta": 1.0, "recurrence": 2}),
    ],
)
def test_a_picture_is_the_same_alone_and_in_a_batch(embedded: Nodes, node_id: str, inputs: dict[str, Any]) -> None:
    things = everything(embedded)
    (sampler,) = call(embedded, node_id, **inputs)
    pair = sample(things, sampler=sampler, batch=2, seed=8)
    assert apart(pair[1:], sample(things, sampler=sampler, batch=1, seed=9)) <= 1e-4
    assert apart(pair[1:], pair[:1]) > 1e-2


def test_cfg_pp_samplers_of_the_pack(embedded: Nodes) -> None:
    from latent_guidance.host import stock

    things = everything(embedded)
    (rules,) = call(embedded, "LGCFG", guidance_scale=2.0)
    pairs = [
        ("LGSamplerDDIMCFGpp", {}, "euler_cfg_pp"),
        ("LGSamplerDPMpp2MCFGpp", {}, "dpmpp_2m_cfg_pp"),
    ]
    for node_id, inputs, name in pairs:
        (own,) = call(embedded, node_id, **inputs)
        (core,) = call(stock.NODE_CLASS_MAPPINGS, "KSamplerSelect", sampler_name=name)
        assert torch.equal(sample(things, rules=rules, sampler=own), sample(things, rules=rules, sampler=core))
        assert apart(sample(things, rules=rules, sampler=own), sample(things, rules=rules)) > 1e-2
    (rectified,) = call(embedded, "LGSamplerRectifiedCFGpp")
    with pytest.raises(UserError, match=r"Rectified-CFG.*flow model"):
        sample(things, sampler=rectified)


@pytest.mark.parametrize("node_id", ["LGSamplerDDIM", "LGSamplerDDPM", "LGSamplerDDIMCFGpp"])
def test_recurrence_of_a_sampler_node(embedded: Nodes, node_id: str) -> None:
    things = everything(embedded)

    def drawn(**inputs: Any) -> torch.Tensor:
        return sample(things, sampler=call(embedded, node_id, **inputs)[0])

    plain = drawn()
    assert torch.equal(plain, drawn(recurrence=1, recurrence_sigma_lo=1.0, recurrence_sigma_hi=2.0))
    assert apart(plain, drawn(recurrence=2)) > 1e-2
    assert torch.equal(plain, drawn(recurrence=2, recurrence_sigma_lo=999.0))
    with pytest.raises(UserError, match="never opens"):
        drawn(recurrence=2, recurrence_sigma_lo=2.0, recurrence_sigma_hi=1.0)


def test_class_probabilities_of_latents_and_pictures(embedded: Nodes) -> None:
    things = everything(embedded)
    samples = sample(things, batch=2)
    chart, table = call(embedded, "LGClassProbabilities", classifier=things["classifier"], latent={"samples": samples})
    rows = [line.split("\t") for line in table.splitlines()]
    assert [row[0] for row in rows] == things["labels"].splitlines()
    for column in (1, 2):
        assert sum(float(row[column]) for row in rows) == pytest.approx(1, abs=2e-3)
    assert chart.ndim == 4 and len(chart) == 2 and chart.shape[3] == 3
    image = call(embedded, "LGVAEDecode", samples={"samples": samples}, vae=things["vae"])[0]
    chart, _ = call(embedded, "LGClassProbabilities", classifier=things["classifier"], image=image, vae=things["vae"])
    assert len(chart) == 2


def test_picture_grid_with_one_and_with_several_inputs(embedded: Nodes) -> None:
    images = torch.rand(4, 32, 32, 3)
    (single,) = call(embedded, "LGPictureGrid", images=images, labels="a\nb", columns=2, gap=4)
    assert single.shape[0] == 1 and single.shape[2] == 4 + 2 * (32 + 4)
    (several,) = call(
        embedded, "LGPictureGrid", images=images, images_2=images, images_3=None, labels="", columns=0, gap=0
    )
    assert several.shape[1:] == (4 * 32, 2 * 32, 3)
    assert torch.allclose(several[0, :32, :32], images[0], atol=1 / 255)


@pytest.mark.parametrize(
    ("node_id", "inputs", "words"),
    [
        ("LGEmptyLatent", {"width": 100, "height": 64}, ["100 x 64", "multiples of 8", "96 x 64"]),
        ("LGLoadCheckpoint", {"checkpoint": "nothing"}, ["nothing", "tiny"]),
        ("LGLoadClassifier", {"classifier": "nothing"}, ["nothing", "tiny"]),
        ("LGLoadNoisyCLIP", {"noisy_clip": "nothing"}, ["noisy-latent CLIP", "tiny", "models/latent_clips", "clip/"]),
        ("LGCFG", {"guidance_scale": 1e6}, ["1000000", "-100", "100"]),
        ("LGLimitedInterval", {"sigma_lo": 5.0, "sigma_hi": 1.0}, ["sigma_lo", "never opens"]),
        ("LGCFG", {"rules": "a text"}, ["str", "rules", "LG_GUIDANCE"]),
        ("LGPictureGrid", {"images": torch.rand(1, 8, 8, 3), "labels": "a\nb"}, ["2 labels", "1 cells"]),
    ],
)
def test_bad_values_are_refused_with_words(
    embedded: Nodes, node_id: str, inputs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        call(embedded, node_id, **inputs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_pairings_are_refused_with_words(embedded: Nodes) -> None:
    things = everything(embedded)
    cfg = call(embedded, "LGCFG", guidance_scale=3.0)[0]
    cases: list[tuple[Any, list[str]]] = [
        (lambda: guide(things, "dragons"), ["dragons", "Flags"]),
        (lambda: call(embedded, "LGVAEEncode", image=torch.rand(1, 65, 64, 3), vae=things["vae"]), ["64 x 65", "8"]),
        (
            lambda: call(embedded, "LGVAEDecode", samples={"samples": torch.zeros(1, 5, 8, 8)}, vae=things["vae"]),
            ["5", "4"],
        ),
        (lambda: sample(things, rules=call(embedded, "LGCFG", rules=cfg)[0]), ["at most one"]),
        (lambda: call(embedded, "LGSamplerDDPM", rules=guide(things, "Flags")), ["Classifier Guidance", "Guider"]),
        (lambda: call(embedded, "LGClassProbabilities", classifier=things["classifier"]), ["latent", "vae"]),
    ]
    for action, words in cases:
        with pytest.raises(UserError) as error:
            action()
        assert all(word in str(error.value) for word in words), str(error.value)


def test_a_report_is_found_by_its_latent_and_drawn(embedded: Nodes) -> None:
    things = everything(embedded)
    (rules,) = call(embedded, "LGCFG", guidance_scale=3.0)
    samples = sample(things, rules=guide(things, "Flags", rules=rules), batch=2, report=True)
    plot, table = call(embedded, "LGGuidanceReport", latent={"samples": samples})
    [chain] = json.loads(table)["chains"]
    assert chain["rules"] == ["Classifier-Free Guidance (CFG)", "Classifier Guidance"]
    assert chain["passes"] == 2 * STEPS == 2 * len(chain["rows"])
    for row in chain["rows"]:
        assert all(0 <= p <= 1 for p in row["notes"]["Classifier Guidance"]["probability"]) and len(row["sigma"]) == 2
        assert min(row["delta"] + row["contributions"]["Classifier Guidance"]) > 0
    assert plot.shape[0] == 1 and plot.shape[3] == 3 and 0 <= plot.min() <= plot.max() <= 1
    other = sample(things, rules=rules)
    with pytest.raises(UserError, match=r"'report'.*Guider"):
        call(embedded, "LGGuidanceReport", latent={"samples": other})


def test_the_guider_says_what_it_costs(embedded: Nodes) -> None:
    things = everything(embedded)
    inputs = {name: things[name] for name in ("model", "positive", "negative")}
    (rules,) = call(embedded, "LGCFG", guidance_scale=3.0)
    (window,) = call(embedded, "LGLimitedInterval", rules=rules)
    assert call(embedded, "LGGuider", **inputs)[1] == "1 network pass a step: positive"
    assert call(embedded, "LGGuider", **inputs, rules=rules)[1] == "2 network passes a step: positive, negative"
    assert "sigma 5.4 to 0.28: 2 (positive, negative)" in call(embedded, "LGGuider", **inputs, rules=window)[1]


LINKED: list[tuple[str, dict[str, Any], str]] = [
    ("LGSeededNoise", {"batch_size": 0}, "batch_size of Seeded Noise is 0"),
    ("LGSeededNoise", {"batch_size": 10**9}, "batch_size of Seeded Noise"),
    ("LGSeededNoise", {"seed": -1}, "seed of Seeded Noise is -1"),
    ("LGSeededNoise", {"batch_size": 2.0}, "a whole number from 1 to 4096"),
    ("LGEmptyLatent", {"spatial_ratio": 0}, "spatial_ratio of Empty Latent (Any Ratio) is 0"),
    ("LGEmptyLatent", {"batch_size": -1}, "batch_size of Empty Latent (Any Ratio) is -1"),
    ("LGPictureGrid", {"images": torch.zeros(1, 2, 2, 3), "columns": -1}, "columns of Picture Grid is -1"),
    ("LGPictureGrid", {"images": torch.zeros(1, 2, 2, 3), "gap": 10**6}, "gap of Picture Grid"),
    ("LGSamplerDDIM", {"recurrence": 33}, "recurrence of DDIM Sampler is 33"),
    ("LGSamplerDDPM", {"recurrence": 0}, "recurrence of DDPM Sampler is 0"),
    ("LGSamplerDDIMCFGpp", {"recurrence_sigma_lo": float("nan")}, "recurrence_sigma_lo of DDIM CFG++ Sampler is nan"),
    ("LGSamplerDDIM", {"eta": 1.5}, "eta of DDIM Sampler is 1.5"),
    ("LGSamplerRectifiedCFGpp", {"gamma": -1.0}, "gamma of Rectified-CFG++ Sampler is -1.0"),
]


@pytest.mark.parametrize(("node_id", "inputs", "words"), LINKED)
def test_numbers_over_a_link_are_held_to_the_same_range(
    embedded: Nodes, node_id: str, inputs: dict[str, Any], words: str
) -> None:
    """ComfyUI checks only what is typed into a node."""
    with pytest.raises(UserError) as error:
        call(embedded, node_id, **inputs)
    assert words in str(error.value)
    images = {"images": torch.zeros(1, 2, 2, 3)} if node_id == "LGPictureGrid" else {}
    call(embedded, node_id, **images)  # the defaults are in range
