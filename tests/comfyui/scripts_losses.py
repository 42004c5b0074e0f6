"""Runs inside ComfyUI (see inside.py): losses at the estimate and through the UNet, with ComfyUI's own UNet and VAE."""

# ruff: noqa: ANN001, ANN201, ANN204
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from inside import call, counted, far, refused, result

STEPS = 4
model, clip, vae = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
latent = torch.zeros(2, 4, 8, 8)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)

picture = torch.ones(1, 64, 64, 3)
picture[:, 16:48, 16:48, 1:] = 0
(encoded,) = call("LGVAEEncode", image=picture, vae=vae, posterior="mode", seed=0)
losses = {
    "reference": call("LGLossReference", reference=encoded)[0],
    "palette": call("LGLossPalette", colours="#ff8000")[0],
}
(cfg,) = call("LGCFG", guidance_scale=2.0)


def sampled(rules, guided=model, sampler="euler"):
    guider = call("LGGuider", model=guided, positive=positive, negative=negative, rules=rules)[0]
    return guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=5)


def value(loss, samples):
    """The loss of what was sampled: of its latents, or of its pictures."""
    if loss.space == "vae":
        return loss(samples)
    image = call("LGVAEDecode", samples={"samples": samples}, vae=vae)[0]
    return loss(image.movedim(-1, 1) * 2 - 1)


plain = sampled(cfg)
for node in ("LGMPGD", "LGDPS", "LGUniversalGuidance"):
    for name, loss in losses.items():
        (rules,) = call(node, loss=loss, vae=vae, rules=cfg)
        guided = sampled(rules)
        result[f"{node} {name}: loss of what it was"] = float((value(loss, guided) / value(loss, plain)).max())
        result[f"{node} {name}: again"] = far(guided, sampled(rules))
        result[f"{node} {name}: finite"] = bool(torch.isfinite(guided).all())

(through,) = call("LGDPS", loss=losses["reference"], guidance_scale=0.3, rules=cfg)
(leaf,) = call("LGMPGD", loss=losses["reference"], rules=cfg)
(patched,) = call("LGApplyGuidance", model=model, rules=leaf)
guider = comfy.samplers.CFGGuider(patched)
guider.set_conds(positive, negative)
guider.set_cfg(2.0)
on_model = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=5)
result["a leaf rule: guider and patch"] = far(sampled(leaf), on_model)
result["through the UNet on a model is refused"] = refused(lambda: call("LGApplyGuidance", model=model, rules=through))

watched, calls = counted(model)
sampled(through, watched)
result["samples a call, through the UNet"] = calls[:]

comfy.model_management.unload_all_models()  # parameters that ComfyUI moves again come back as inference tensors
result["after the models were unloaded"] = far(sampled(through), sampled(through))

area = [[entry[0], {**entry[1], "area": (8, 4, 0, 0), "strength": 1.0}] for entry in positive]
in_part = call("LGGuider", model=model, positive=positive + area, negative=negative, rules=through)[0]
sampler = comfy.samplers.sampler_object("dpmpp_2m")
half = in_part.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=5)
result["with an area"] = bool(torch.isfinite(half).all())


class Wrong:
    """A loss of one number for the whole batch."""

    space = "latent"

    def __call__(self, estimate):
        return estimate.square().mean()


result["a wrong loss is named"] = refused(lambda: sampled(call("LGDPS", loss=Wrong())[0]))
