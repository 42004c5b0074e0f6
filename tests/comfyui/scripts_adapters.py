"""Runs inside ComfyUI (see inside.py): LoRA and ControlNet, as core loads and applies them, on a checkpoint folder's own MODEL and CLIP."""

# ruff: noqa: ANN001, ANN201
import comfy.cldm.cldm
import comfy.controlnet
import comfy.lora
import comfy.ops
import comfy.sd
import torch
from inside import call, far, result
from stage import Stage, cfg, patch, rule

import nodes

model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
(classifier,) = call("LGLoadClassifier", classifier="tiny")[:1]
guiding = rule(classifier, cfg(3.0), label="Flags")
latent = torch.zeros(2, 4, 8, 8)


def lora(names, into):
    """Random low-rank weights for the first of ``names`` whose weight is a matrix of ``into``."""
    weights = into.state_dict()
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, key in names.items():
        weight = weights.get(key) if isinstance(key, str) else None
        if name.startswith("lora_") and weight is not None and weight.ndim == 2:
            out, inner = weight.shape
            made[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
            made[f"{name}.lora_down.weight"] = torch.randn(4, inner, generator=generator)
            made[f"{name}.alpha"] = torch.tensor(4.0)
    return made


def pictures(guided, first=positive, second=negative):
    """Under core's CFG, by our guider, and by our patch."""
    stage = Stage(guided, first, second, latent)
    return stage.core(guided, 3.0), stage.ours(guiding), stage.core(patch(guided, guiding), 3.0)


def compared(found, before):
    return {
        "finite": all(bool(torch.isfinite(picture).all()) for picture in found),
        "acts": far(found[0], before[0]),
        "acts beside guidance": far(found[1], before[1]),
        "guidance acts": far(found[1], found[0]),
        "guider and patch": far(found[1], found[2]),
    }


before = pictures(model)

unet_keys = comfy.lora.model_lora_keys_unet(model.model, {})
text_keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
weights = lora(unet_keys, model.model) | lora(text_keys, clip.cond_stage_model)
result["lora matrices"] = [len(lora(unet_keys, model.model)) // 3, len(lora(text_keys, clip.cond_stage_model)) // 3]
adapted, adapted_clip = comfy.sd.load_lora_for_models(model, clip, weights, 0.5, 0.5)
result["lora"] = compared(pictures(adapted), before)
unadapted, _ = comfy.sd.load_lora_for_models(model, clip, weights, 0.0, 0.0)
result["lora at strength 0"] = far(pictures(unadapted)[1], before[1])
result["the model is left alone"] = far(pictures(model)[1], before[1])
(by_adapted,) = call("LGTextEncode", clip=adapted_clip, text="a red apple")
result["lora of the text encoder"] = far(by_adapted[0][0], positive[0][0])

config = {key: value for key, value in model.model.model_config.unet_config.items() if key != "out_channels"}
torch.manual_seed(5)
network = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **config)
with torch.no_grad():
    for weight in network.parameters():
        weight.copy_(torch.randn(weight.shape) * 0.1)
network = network.float().eval()
control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
hint = torch.rand(1, 64, 64, 3)
apply = nodes.ControlNetApplyAdvanced().apply_controlnet
first, second = apply(positive, negative, control, hint, 0.6, 0.0, 1.0)
result["control"] = compared(pictures(model, first, second), before)
ending = apply(positive, negative, control, hint, 0.6, 0.999, 1.0)
result["control that begins at the end"] = far(pictures(model, *ending)[1], before[1])
