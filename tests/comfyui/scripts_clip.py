"""Runs inside ComfyUI (see inside.py): noisy-latent CLIP guidance as GUIDER and as MODEL patch, its memory, and what is refused."""

# ruff: noqa: ANN001, ANN003, ANN201
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from inside import call, far, refused, result

STEPS = 4
model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
(noisy_clip,) = call("LGLoadNoisyCLIP", noisy_clip="tiny")
(positive,) = call("LGNullConditioning", clip=clip)
(target,) = call("LGTextEncode", clip=clip, text="a (red:1.3) apple")
(away,) = call("LGTextEncode", clip=clip, text="a flag")
latent = torch.zeros(2, 4, 8, 8)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)


def rule(rules=(), **more):
    inputs = dict(guidance_scale=40.0, away_scale=1.0, sigma_lo=0.0, sigma_hi=1000.0, every_k=1, gradient_clip=1000.0)
    inputs |= dict(noisy_clip=noisy_clip, target=target, scaling="raw", rules=rules)
    return call("LGNoisyCLIPGuidance", **(inputs | more))[0]


def ours(rules=(), guided=model, callback=None):
    guider = call("LGGuider", model=guided, positive=positive, negative=None, rules=rules)[0]
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, latent, euler, sigmas, callback=callback, disable_pbar=True, seed=5)


def ksampler(guided):
    return comfy.sample.sample(
        guided, noise, STEPS, 1.0, "euler", "karras", positive, positive, latent, seed=5, disable_pbar=True
    )


plain, guided = ours(), ours(rule())
(patched,) = call("LGApplyGuidance", model=model, rules=rule())
result["finite"] = bool(torch.isfinite(guided).all())
result["acts"] = far(plain, guided)
result["another text"] = far(guided, ours(rule(target=away)))
result["away acts"] = far(guided, ours(rule(away=away)))
result["again"] = far(guided, ours(rule()))
result["on the model"] = far(guided, ours(guided=patched))
result["on the model, under KSampler"] = far(guided, ksampler(patched))

seen = []
ours(
    rule(),
    callback=lambda *_: seen.append(
        any(loaded.is_clone(noisy_clip.patcher) for loaded in comfy.model_management.loaded_models())
    ),
)
result["managed"] = all(seen) and len(seen) == STEPS
comfy.model_management.unload_all_models()
noisy_clip.network.to(torch.float64).to(torch.float32)  # inference mode makes these inference tensors
result["inference tensors"] = any(p.is_inference() for p in noisy_clip.network.parameters())
result["after unloading"] = far(guided, ours(rule()))

result["refused: wide"] = refused(lambda: rule(target=[[torch.zeros(1, 77, 768), {}]]))
result["refused: another encoder"] = refused(lambda: rule(target=[[target[0][0] + 1.0, {}]]))
result["refused: nothing"] = refused(lambda: rule(target=[]))
