"""Whole workflows, from file to picture, with a tiny checkpoint of random weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_guidance.errors import UserError
from latent_guidance.host import context, memory
from latent_guidance.host.run import run_workflow

from .graphs import Editor, Json

ROOT = Path(__file__).resolve().parents[2]


def text_to_image(**sampler: Any) -> Json:
    settings = {"seed": 7, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "1": {"class_type": "LGLoadCheckpoint", "inputs": {"checkpoint": "tiny"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.3) apple", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 70, "height": 48, "batch_size": 2}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
                **settings, **sampler,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "t"}},
    }  # fmt: skip


class Runner:
    def __init__(self, folder: Path, models: Path) -> None:
        self.folder, self.models = folder, models
        self.count = 0

    def __call__(self, workflow: Json, *settings: str) -> list[Path]:
        self.count += 1
        path = self.folder / "w.json"
        path.write_text(json.dumps(workflow), encoding="utf-8")
        host = context.Host(
            output=self.folder / f"out{self.count}", input=self.folder, models=self.models, device_name="cpu"
        )
        return run_workflow(path, host=host, settings=settings, pack=ROOT).saved

    def pixels(self, workflow: Json, *settings: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(path)).astype(float) for path in self(workflow, *settings)])


@pytest.fixture
def run(tmp_path: Path, models: Path) -> Runner:
    return Runner(tmp_path, models)


def test_text_to_image(run: Runner) -> None:
    paths = run(text_to_image())
    assert [path.name for path in paths] == ["t_00001_.png", "t_00002_.png"]
    pictures = [np.asarray(Image.open(path)) for path in paths]
    assert pictures[0].shape == (48, 64, 3)  # 70 is cut to a multiple of 8, as ComfyUI does
    assert pictures[0].std() > 5
    assert (pictures[0] != pictures[1]).any()
    assert json.loads(Image.open(paths[0]).info["prompt"])["5"]["inputs"]["seed"] == 7


def test_the_same_again_and_another_seed(run: Runner) -> None:
    first = run.pixels(text_to_image())
    assert (run.pixels(text_to_image()) == first).all()
    assert np.abs(run.pixels(text_to_image(), "KSampler.seed=8") - first).mean() > 1


def test_prompt_scale_and_denoise_matter(run: Runner) -> None:
    first = run.pixels(text_to_image())
    for setting in ("2.text=a green pear", "5.cfg=1", "5.denoise=0.5", "5.sampler_name=heun", "5.scheduler=karras"):
        assert np.abs(run.pixels(text_to_image(), setting) - first).mean() > 0.01, setting


def custom(guider: Json, **more: Json) -> Json:
    graph = text_to_image()
    graph["5"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["10", 0], "guider": ["11", 0], "sampler": ["12", 0], "sigmas": ["13", 0],
                   "latent_image": ["4", 0]},
    }  # fmt: skip
    graph["10"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}}
    graph["11"] = guider
    graph["12"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    graph["13"] = {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["1", 0], "scheduler": "normal", "steps": 3, "denoise": 1.0},
    }
    return {**graph, **more}


def cfg_guider(model: Any = ("1", 0), cfg: float = 4.0) -> Json:
    inputs = {"model": list(model), "positive": ["2", 0], "negative": ["3", 0], "cfg": cfg}
    return {"class_type": "CFGGuider", "inputs": inputs}


def test_ksampler_taken_apart(run: Runner) -> None:
    assert (run.pixels(custom(cfg_guider())) == run.pixels(text_to_image())).all()
    basic = {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["2", 0]}}
    assert (run.pixels(custom(basic)) == run.pixels(text_to_image(cfg=1.0))).all()


def classifier_rules(scale: float = 200.0, label: str = "flags") -> Json:
    knobs = {"guidance_scale": scale, "combine": "any", "sigma_lo": 0.0, "sigma_hi": 1000.0, "every_k": 1}
    return {
        "20": {"class_type": "LGLoadClassifier", "inputs": {"classifier": "tiny"}},
        "21": {
            "class_type": "LGClassifierGuidance",
            "inputs": {
                "classifier": ["20", 0],
                "label": label,
                "clip": 1000.0,
                "scaling": "raw",
                "form": "score",
                **knobs,
            },
        },
        "22": {"class_type": "LGCFG", "inputs": {"guidance_scale": 4.0, "rules": ["21", 0]}},
        "23": {"class_type": "LGApplyGuidance", "inputs": {"model": ["1", 0], "rules": ["21", 0]}},
    }


def test_the_same_rules_in_a_guider_on_a_model_and_under_ksampler(run: Runner) -> None:
    guider = {
        "class_type": "LGGuider",
        "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "rules": ["22", 0]},
    }
    by_guider = run.pixels(custom(guider, **classifier_rules()))
    by_patch = run.pixels(custom(cfg_guider(("23", 0)), **classifier_rules()))
    sampler = text_to_image(model=["23", 0])
    by_sampler = run.pixels({**sampler, **classifier_rules()})
    assert (by_guider == by_patch).all()
    assert (by_guider == by_sampler).all()
    unguided = run.pixels(text_to_image())
    assert np.abs(by_guider - unguided).mean() > 1
    away = run.pixels({**sampler, **classifier_rules(-200.0)})
    assert np.abs(by_guider - away).mean() > 1


def test_an_unknown_label_lists_the_labels(run: Runner) -> None:
    graph = {**text_to_image(model=["23", 0]), **classifier_rules(label="flag")}
    with pytest.raises(UserError, match="animals, flags, food, smileys"):
        run(graph)
    assert not (run.folder / "out1").exists()


@pytest.mark.parametrize("sampler", ["LGSamplerDDPM", "LGSamplerDDIM"])
def test_our_own_noise_is_per_picture(run: Runner, sampler: str) -> None:
    options = {"LGSamplerDDPM": {"variance": "beta"}, "LGSamplerDDIM": {"eta": 1.0}}[sampler]
    graph = custom(cfg_guider())
    graph["12"] = {"class_type": sampler, "inputs": options}
    graph["10"] = {"class_type": "LGSeededNoise", "inputs": {"seed": 5, "batch_size": 2}}
    both = run.pixels(graph)
    alone = run.pixels(graph, "4.batch_size=1", "10.seed=6", "10.batch_size=1")
    assert np.abs(both[1] - alone[0]).max() <= 1
    assert np.abs(both[0] - alone[0]).mean() > 1


def test_image_to_image_from_a_file(run: Runner) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 75, 4), dtype=np.uint8)).save(run.folder / "p.png")
    graph = text_to_image(latent_image=["9", 0], denoise=0.5)
    graph["8"] = {"class_type": "LoadImage", "inputs": {"image": "p.png"}}
    graph["9"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["8", 0], "vae": ["1", 2]}}
    assert run.pixels(graph).shape == (1, 56, 72, 3)  # cropped around the middle to multiples of 8


def test_the_editors_format_is_saved_with_what_was_run(run: Runner) -> None:
    editor = Editor()
    editor.node("LGLoadCheckpoint", "", "MODEL:MODEL CLIP:CLIP VAE:VAE", ["tiny"])
    editor.node("CLIPTextEncode", "clip:CLIP", "CONDITIONING:CONDITIONING", ["apple"], title="Prompt")
    editor.node("EmptyLatentImage", "", "LATENT:LATENT", [64, 64, 1])
    slots = "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT"
    editor.node("KSampler", slots, "LATENT:LATENT", [7, "fixed", 2, 1.0, "euler", "normal", 1.0])
    editor.node("VAEDecode", "samples:LATENT vae:VAE", "IMAGE:IMAGE")
    editor.node("SaveImage", "images:IMAGE", values=["sub/%KSampler.seed%"])
    for origin, slot, target, name in (
        (1, 1, 2, "clip"), (1, 0, 4, "model"), (2, 0, 4, "positive"), (2, 0, 4, "negative"),
        (3, 0, 4, "latent_image"), (4, 0, 5, "samples"), (1, 2, 5, "vae"), (5, 0, 6, "images"),
    ):  # fmt: skip
        editor.link(origin, slot, target, name)
    [path] = run(editor.data(), "KSampler.seed=9", "Prompt.text=pear")
    assert path.parts[-2:] == ("sub", "9_00001_.png")
    info = Image.open(path).info
    workflow = json.loads(info["workflow"])
    assert workflow["nodes"][3]["widgets_values"][0] == 9
    assert workflow["nodes"][1]["widgets_values"] == ["pear"]
    assert json.loads(info["prompt"])["2"]["inputs"]["text"] == "pear"
    [again] = run(workflow)
    assert (np.asarray(Image.open(again)) == np.asarray(Image.open(path))).all()


def test_a_model_that_is_gone(run: Runner) -> None:
    graph = text_to_image()
    graph["1"]["inputs"]["checkpoint"] = "gone"
    with pytest.raises(
        UserError, match=r"node 1 \(LGLoadCheckpoint\): 'checkpoint' is 'gone'. Expected: one of .*tiny"
    ):
        run(graph)


def test_a_batch_that_cannot_fit_is_refused_before_anything_runs(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device=None: 8 * 2.0**30)
    monkeypatch.setattr("latent_guidance.host.executor.Executor.run", lambda *_: pytest.fail("it ran"))
    graph = text_to_image()
    graph["4"]["inputs"] = {"width": 16384, "height": 16384, "batch_size": 4096}
    with pytest.raises(UserError, match="a batch of 4096 at 16384x16384 needs at least"):
        run(graph)


def test_nothing_is_saved_when_a_later_node_fails(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = text_to_image()
    graph["6"]["inputs"]["samples"] = ["4", 0]
    monkeypatch.setattr(
        "latent_guidance.host.objects.Vae.decode", lambda self, samples: torch.full((2, 8, 8, 3), float("nan"))
    )
    with pytest.raises(UserError, match="not finite"):
        run(graph)
    assert [path for path in run.folder.rglob("*") if path.suffix in (".png", ".part")] == []


def workflows() -> list[Path]:
    """Those on the bundled model; the others need ComfyUI's own loaders, and their twins are tested with the nodes."""
    every = sorted((ROOT / "workflows").glob("*.json"))
    return [path for path in every if not path.stem.startswith(("sd15_", "sdxl_", "sd3_"))]


@pytest.mark.parametrize("path", workflows(), ids=lambda path: path.stem)
def test_the_example_workflows_run(run: Runner, path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    small = {
        "LGLoadCheckpoint": "checkpoint=tiny",
        "LGLoadClassifier": "classifier=tiny",
        "LGLoadNoisyCLIP": "noisy_clip=tiny",
        "LGClassifierGuidance": "label=flags",
        "LGLossClassLabel": "label=flags",
        "KSampler": "steps=2",
        "BasicScheduler": "steps=2",
    }
    settings = [f"{node['id']}.{small[node['type']]}" for node in data["nodes"] if node["type"] in small]
    assert settings
    assert run(data, *settings)


@pytest.mark.parametrize("path", workflows(), ids=lambda path: path.stem)
def test_the_example_workflows_are_their_api_twins(path: Path) -> None:
    from latent_guidance.host.convert import convert
    from latent_guidance.host.pack import node_library

    twin = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    prompt = convert(copy.deepcopy(json.loads(path.read_text(encoding="utf-8"))), node_library(ROOT)).prompt
    assert {k: (v["class_type"], v["inputs"]) for k, v in prompt.items()} == {
        k: (v["class_type"], v["inputs"]) for k, v in twin.items()
    }


def test_a_unet_beside_a_vae_that_shifts_is_refused(run: Runner, models: Path, tmp_path: Path) -> None:
    run.models = tmp_path / "models"
    shutil.copytree(models / "latent_guidance" / "tiny", run.models / "tiny")
    config = run.models / "tiny" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift_factor": 0.1}))
    graph = text_to_image()
    graph["10"] = {"class_type": "LGLoadUNet", "inputs": {"checkpoint": "tiny"}}
    graph["11"] = {"class_type": "LGLoadTextEncoder", "inputs": {"checkpoint": "tiny"}}
    graph["5"]["inputs"]["model"] = ["10", 0]
    for node in ("2", "3"):
        graph[node]["inputs"]["clip"] = ["11", 0]
    with pytest.raises(UserError, match=r"node 10 .*shift_factor 0.1"):
        run(graph)
