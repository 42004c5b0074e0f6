"""Runs inside ComfyUI (see inside.py): guidance of models whose weights are loaded in part, as on a small GPU, and by --novram.

On a CPU nothing is moved, but what ComfyUI does instead of moving is done: layers that stay behind cast their weights, and put
adapters on them, at every call.
"""

# ruff: noqa: ANN001, ANN003, ANN201
import tempfile
from contextlib import contextmanager
from unittest.mock import patch

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import families
import torch
from inside import call, far, part, result
from stage import Stage, cfg, classifier_for, rule

ModelPatcher = comfy.model_patcher.ModelPatcher
management = comfy.model_management
latents_of = part("nodes.runtime.comfy.checks").latents_of
partially_load = ModelPatcher.partially_load


def left(patcher):
    """How many layers of a network cast their weights at every call, and how many are loaded."""
    modules = [module for module in patcher.model.modules() if list(module.parameters(recurse=False))]
    return [
        sum(hasattr(module, "prev_comfy_cast_weights") for module in modules),
        sum(getattr(module, "comfy_patched_weights", False) for module in modules),
    ]


def half(patcher, device_to, extra_memory=0, **more):
    """``partially_load`` where there is room for half of a network, whatever is asked for; one that must be whole gets it."""
    if type(patcher) is ModelPatcher:
        extra_memory = max(0.1, patcher.model_size() / 2 - patcher.loaded_size())
    return partially_load(patcher, device_to, extra_memory, **more)


@contextmanager
def loading(way):
    """In this context models are loaded "whole", "half", or as by "novram"."""
    management.unload_all_models()
    with (
        patch.object(ModelPatcher, "partially_load", half if way == "half" else partially_load),
        patch.object(
            management, "is_device_cpu", lambda device: way != "novram" and torch.device(device).type == "cpu"
        ),
        patch.object(
            management, "vram_state", management.VRAMState.NO_VRAM if way == "novram" else management.vram_state
        ),
    ):
        yield


def with_lora(model):
    """A clone with something added to every second weight, when they are loaded or cast."""
    weights = {
        key: value
        for key, value in model.model.state_dict().items()
        if key.startswith("diffusion_model.") and value.ndim > 1
    }
    generator, changed = torch.Generator().manual_seed(2), model.clone()
    lora = {
        key: (0.3 * value.float().std() * torch.randn(value.shape, generator=generator),)
        for key, value in list(weights.items())[::2]
    }
    assert len(lora) > 1 and len(changed.add_patches(lora, 1.0)) == len(lora)
    return changed


def tiny():
    model, clip, vae = call("LGLoadCheckpoint", checkpoint="tiny")
    return model, call("LGTextEncode", clip=clip, text="a red apple")[0], call("LGNullConditioning", clip=clip)[0], vae


def sd3():
    with tempfile.TemporaryDirectory() as folder:
        (model,) = call("UNETLoader", unet_name=families.make("sd3", folder), weight_dtype="default")
        return model, families.condition("sd3", 1), families.condition("sd3", 2), None


def chains(classifier, vae, latents):
    """Name -> chain: a rule on x, one through the denoiser, one through the VAE."""
    reference = {"samples": torch.randn(1, latents.channels, 8, 8, generator=torch.Generator().manual_seed(1))}
    to_latent = call("LGLossReference", reference=reference)[0]
    found = {
        "classifier": rule(classifier, cfg(2.0)),
        "DPS": call("LGDPS", loss=to_latent, rules=cfg(2.0))[0],
    }
    if vae is not None:
        to_colour = call("LGLossPalette", colours="#ff8000")[0]
        found["MPGD"] = call("LGMPGD", loss=to_colour, vae=vae, rules=cfg(2.0))[0]
    return found


for name, load in (("tiny", tiny), ("sd3", sd3)):
    model, positive, negative, vae = load()
    latents = latents_of(model.get_model_object("latent_format"))
    classifier = classifier_for(latents)
    stage = Stage(with_lora(model), positive, negative, torch.zeros(1, latents.channels, 8, 8))
    samples = {}
    result[name] = {}
    for way in ("whole", "half", "novram"):
        for kind, rules in chains(classifier, vae, latents).items():
            with loading(way), patch.object(comfy.ops, "cast_bias_weight", wraps=comfy.ops.cast_bias_weight) as casts:
                samples[way, kind] = stage.ours(rules)
                result[name][f"{way}, {kind}"] = {
                    "same": far(samples["whole", kind], samples[way, kind]),
                    "model": left(model), "vae": vae and left(vae.patcher), "casts": casts.call_count,
                    "adapters": model.model.lowvram_patch_counter,
                    "classifier": classifier.patcher.loaded_size() / classifier.patcher.model_size(),
                }  # fmt: skip
    with loading("whole"):
        without = Stage(model, positive, negative, stage.latent).ours(chains(classifier, vae, latents)["classifier"])
        plain = stage.ours(cfg(2.0))
    result[name]["without the adapter"] = far(samples["whole", "classifier"], without)
    result[name]["unguided"] = {kind: far(plain, samples["whole", kind]) for way, kind in samples if way == "whole"}

# a part of it leaves between two runs, for another model
model, positive, negative, _ = tiny()
stage = Stage(with_lora(model), positive, negative, torch.zeros(1, 4, 8, 8))
classifier = classifier_for(latents_of(model.get_model_object("latent_format")))
rules = rule(classifier, cfg(2.0))
with loading("whole"):
    before = stage.ours(rules)
    before_left = left(model)
    freed = stage.model.partially_unload(stage.model.offload_device, stage.model.model_size() / 2)
with patch.object(ModelPatcher, "partially_load", half):
    after = stage.ours(rules)
    after_left = left(model)
again = stage.ours(rules)
result["a part unloaded"] = {
    "same": far(before, after), "whole again": far(before, again), "freed": freed,
    "left": [found[0] for found in (before_left, after_left, left(model))],
}  # fmt: skip

# a network of plain torch layers, by its own patcher and by a plain one
result["tiny budget"] = {}
for name, patcher in (
    ("ours", classifier.patcher),
    ("plain", ModelPatcher(classifier.network, classifier.patcher.load_device, classifier.patcher.offload_device)),
):
    patcher.detach()
    patcher.partially_load(patcher.load_device, 0.1)
    loaded = patcher.loaded_size() / patcher.model_size()
    freed = patcher.partially_unload(patcher.offload_device, 1)
    result["tiny budget"][name] = [loaded, freed, patcher.loaded_size() / patcher.model_size()]
