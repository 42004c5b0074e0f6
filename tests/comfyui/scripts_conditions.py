"""Runs inside ComfyUI (see inside.py): conditionings of every kind, masks, img2img, other samplings, interrupts and memory."""

# ruff: noqa: ANN001, ANN003, ANN201, ANN202
import gc
import weakref
from functools import partial

import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_model_advanced as advanced
import stage
import torch
from inside import call, far, part, refused, result

import nodes

model, clip, vae = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(other,) = call("LGTextEncode", clip=clip, text="a blue flag")
(negative,) = call("LGNullConditioning", clip=clip)
guiders = part("nodes.runtime.comfy.guider")
checks = part("nodes.runtime.comfy.checks")
latents = checks.latents_of(model.model.latent_format)
classifier = stage.classifier_for(latents)
rule, both = stage.rule(classifier), stage.rule(classifier, stage.cfg(4.0))
latent = torch.zeros(2, 4, 8, 8)
usual = stage.Stage(model, positive, negative, latent, steps=4)
result["finite"] = True


def pair(here, **more):
    """[our CFG against core's, guider against patch, guided against not] of one stage."""
    plain, guided = here.core(here.model, 4.0, **more), here.ours(both, **more)
    result["finite"] &= bool(torch.isfinite(guided).all())
    by_patch = here.core(stage.patch(here.model, rule), 4.0, **more)
    return [far(plain, here.ours(stage.cfg(4.0), **more)), far(guided, by_patch), far(plain, guided)]


# --- conditionings ---------------------------------------------------------------------------------------------------------

half = torch.zeros(1, 64, 64)
half[..., 32:] = 1
combined = call("ConditioningCombine", conditioning_1=positive, conditioning_2=other)[0]
area = call("ConditioningSetArea", conditioning=other, width=32, height=64, x=0, y=0, strength=1.0)[0]
masked = call("ConditioningSetMask", conditioning=other, mask=half, set_cond_area="default", strength=1.0)[0]
bounded = call("ConditioningSetMask", conditioning=other, mask=half, set_cond_area="mask bounds", strength=0.7)[0]
early = call("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.5)[0]
late = call("ConditioningSetTimestepRange", conditioning=other, start=0.5, end=1.0)[0]
KINDS = {
    "plain": (positive, negative),
    "combined": (combined, negative),
    "an area": (positive + area, negative),
    "a mask": (positive + masked, negative),
    "a mask's bounds": (positive + bounded, negative),
    "one after the other": (early + late, negative),
    "averaged": (
        call("ConditioningAverage", conditioning_to=positive, conditioning_from=other, conditioning_to_strength=0.4)[0],
        negative,
    ),
    "joined": (call("ConditioningConcat", conditioning_to=positive, conditioning_from=other)[0], negative),
    "a negative with an area": (positive, negative + area),
    "a negative of two": (positive, call("ConditioningCombine", conditioning_1=negative, conditioning_2=other)[0]),
}
result["kinds"], pictures = {}, {}
for name, conds in KINDS.items():
    here = stage.Stage(model, *conds, latent, steps=4)
    result["kinds"][name], pictures[name] = pair(here), here.ours(both)
result["kinds differ"] = {
    name: far(pictures["plain"], picture) for name, picture in pictures.items() if name != "plain"
}

# --- inpainting, img2img, tiles ----------------------------------------------------------------------------------------------

start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
kept = call("SetLatentNoiseMask", samples={"samples": start}, mask=half)[0]["noise_mask"]
inpainting = stage.Stage(model, positive, negative, start, steps=4)
result["inpainting"] = pair(inpainting, denoise_mask=kept)
painted = inpainting.ours(both, denoise_mask=kept)
result["what the mask keeps"] = far(start[..., :4], painted[..., :4])
result["what it does not"] = far(start[..., 4:], painted[..., 4:])
result["inpainting: ksampler"] = far(painted, inpainting.ksampler(stage.patch(model, rule), 4.0, noise_mask=kept))

partly = stage.Stage(model, positive, negative, start, steps=4)
sampler = comfy.samplers.KSampler(model, 4, "cpu", "euler", "simple", 0.5)
partly.sigmas = sampler.sigmas
result["img2img"] = pair(partly)
by_ksampler = partly.ksampler(stage.patch(model, rule), 4.0, denoise=0.5)
result["img2img: ksampler"] = far(partly.ours(both), by_ksampler)
result["img2img is not txt2img"] = far(partly.ours(both), usual.ours(both))
wide = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(4))
whole = call("VAEDecode", samples={"samples": wide}, vae=vae)[0]
tiled = call("VAEDecodeTiled", vae=vae, samples={"samples": wide}, tile_size=64, overlap=32)[0]
result["tiles"] = [list(tiled.shape), bool(torch.isfinite(tiled).all()), float((tiled - whole).abs().mean())]
one_tile = call("VAEDecodeTiled", vae=vae, samples={"samples": wide}, tile_size=512, overlap=64)[0]
result["one tile"] = far(whole, one_tile)
result["tiles of another latent"] = float((tiled.flip(1) - whole).abs().mean())

# --- what nodes make of a model's sampling -------------------------------------------------------------------------------------


def resampled(node, on, **inputs):
    cls = getattr(advanced, node)
    return getattr(cls(), cls.FUNCTION)(model=on, **inputs)[0]


EDM = dict(sigma_max=80.0, sigma_min=0.02)
SAMPLINGS = {
    "eps": lambda m: resampled("ModelSamplingDiscrete", m, sampling="eps", zsnr=False),
    "v": lambda m: resampled("ModelSamplingDiscrete", m, sampling="v_prediction", zsnr=False),
    "v, zero terminal snr": lambda m: resampled("ModelSamplingDiscrete", m, sampling="v_prediction", zsnr=True),
    "x0": lambda m: resampled("ModelSamplingDiscrete", m, sampling="x0", zsnr=False),
    "lcm": lambda m: resampled("ModelSamplingDiscrete", m, sampling="lcm", zsnr=False),
    "edm": lambda m: resampled("ModelSamplingContinuousEDM", m, sampling="edm", **EDM),
    "continuous eps": lambda m: resampled("ModelSamplingContinuousEDM", m, sampling="eps", **EDM),
    "continuous v": lambda m: resampled("ModelSamplingContinuousV", m, sampling="v_prediction", **EDM),
    "flow": lambda m: resampled("ModelSamplingSD3", m, shift=3.0),
    "flow of aura": lambda m: resampled("ModelSamplingAuraFlow", m, shift=1.7),
    "flow of flux": lambda m: resampled(
        "ModelSamplingFlux", m, max_shift=1.15, base_shift=0.5, width=1024, height=1024
    ),
}
result["samplings"], result["node after ours"], result["sampling differs"], result["process"] = {}, {}, {}, {}
for name, change in SAMPLINGS.items():
    here = stage.Stage(change(model), positive, negative, latent, steps=4)
    result["process"][name] = guiders.process_of(here.model.get_model_object("model_sampling")).name
    with stage.noted() as warnings:
        result["samplings"][name] = pair(here)
    result["samplings"][name].append(warnings)
    guided = here.ours(both)
    result["node after ours"][name] = far(guided, here.core(change(stage.patch(model, rule)), 4.0))
    result["sampling differs"][name] = far(guided, usual.ours(both))
after = resampled("ModelSamplingContinuousEDM", stage.patch(model, rule), sampling="edm_playground_v2.5", **EDM)
result["other latents by a node after ours"] = refused(lambda: usual.core(after, 4.0))

# --- bad input ---------------------------------------------------------------------------------------------------------------


def warned(action):
    with stage.noted() as warnings:
        action()
    return warnings


broken = stage.classifier_for(latents)
with torch.inference_mode(False), torch.no_grad():
    broken.network.head.bias.fill_(float("nan"))
result["NaN: warnings"] = warned(lambda: usual.ours(stage.rule(broken), negative=False))
result["NaN: unguided"] = far(usual.basic(model), usual.ours(stage.rule(broken), negative=False))
result["closed window"] = warned(lambda: usual.ours(stage.rule(classifier, sigma_lo=500.0), negative=False))
result["closed window: on the model"] = warned(
    lambda: usual.basic(stage.patch(model, stage.rule(classifier, sigma_lo=500.0)))
)
result["open window"] = warned(lambda: usual.ours(rule, negative=False))

rescaled = advanced.RescaleCFG().patch(model, 0.7)[0]
changed = model.clone()
changed.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
result["combined anew"] = {
    "cfg": warned(lambda: usual.core(stage.patch(changed, stage.cfg(4.0)), 4.0)),
    "only ours before": warned(lambda: usual.core(stage.patch(stage.patch(model, stage.cfg(4.0)), rule), 4.0)),
    "a gradient": warned(lambda: usual.core(stage.patch(changed, rule), 4.0)),
}
result["replaced"] = {
    "cfg": warned(lambda: stage.Stage(rescaled, positive, negative, latent, steps=2).ours(both)),
    "cfg on the model": warned(lambda: usual.core(stage.patch(rescaled, stage.cfg(4.0)), 4.0)),
    "no other node": warned(lambda: usual.ours(both)),
    "no cfg": warned(lambda: usual.core(stage.patch(rescaled, rule), 4.0)),
}
result["replaced: acts"] = far(usual.core(stage.patch(model, rule), 4.0), usual.core(stage.patch(rescaled, rule), 4.0))


def noted_config(**changes):
    """A clone whose model says of itself what a distilled one says."""
    made = model.clone()
    made.model = type("Other", (), {"__getattr__": lambda self, name: getattr(model.model, name)})()
    made.model.model_config = type(
        "Flux" if changes["guidance_embed"] else "FluxSchnell", (), {"unet_config": changes}
    )()
    return made


result["distilled"] = {}
for kind, embed in (("dev", True), ("schnell", False)):
    guided_by = noted_config(guidance_embed=embed, image_model="flux")
    for name, rules in (("cfg", stage.cfg(4.0)), ("gradient", rule)):
        making = partial(guiders.make_guider, guided_by, positive, negative, rules)
        result["distilled"][f"{kind}, {name}"] = warned(making)

# --- interrupts ----------------------------------------------------------------------------------------------------------------


def interrupted(make, on=model):
    """How many calls of the network there were, the second of which is interrupted, and how it ended."""
    calls, watched = [], on.clone()

    def wrapper(apply_model, args):
        calls.append(1)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing(True)
        return apply_model(args["input"], args["timestep"], **args["c"])

    watched.set_model_unet_function_wrapper(wrapper)
    ended = refused(lambda: make(watched)).split(":")[0]
    comfy.model_management.interrupt_current_processing(False)
    return [len(calls), ended]


def by_our_sampler(name):
    """The same with one of the pack's samplers, at its defaults, and a model and a scale that it takes."""
    inputs = nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    sampler = call(name, **{key: spec[1]["default"] for key, spec in inputs.items()})[0]
    on, scale = (SAMPLINGS["flow"](model), 1.0) if name == "LGSamplerRectifiedCFGpp" else (model, 2.0)
    here = stage.Stage(on, positive, negative, latent, steps=4)
    ways = dict(disable_pbar=True, seed=5)
    return interrupted(
        lambda watched: here.guider(stage.cfg(scale), watched).sample(here.noise, latent, sampler, here.sigmas, **ways),
        on,
    )


own = [
    name
    for name, cls in nodes.NODE_CLASS_MAPPINGS.items()
    if name.startswith("LG") and cls.RETURN_TYPES == ("SAMPLER",)
]
result["interrupted"] = {name: by_our_sampler(name) for name in own}
result["interrupted"]["guider"] = interrupted(lambda watched: usual.ours(rule, watched))
result["interrupted"]["patch"] = interrupted(lambda watched: usual.basic(stage.patch(watched, rule)))

# --- memory ----------------------------------------------------------------------------------------------------------------------


def tensors():
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)


def a_run():
    usual.ours(both)
    usual.core(stage.patch(model, rule), 4.0)


a_run()
counts = [tensors()]
for _ in range(3):
    a_run()
    counts.append(tensors())
result["tensors after each run"] = counts
fresh = stage.classifier_for(latents)
guider = usual.guider(stage.rule(fresh))
usual.run(guider)
refs = [weakref.ref(thing) for thing in (fresh.network, fresh.patcher, guider, guider.model_patcher)]
managed = [loaded.model for loaded in comfy.model_management.current_loaded_models]
result["managed while in use"] = any(one is not None and one.is_clone(fresh.patcher) for one in managed)
del fresh, guider, managed
gc.collect()
comfy.model_management.cleanup_models_gc()
result["let go of"] = [ref() is None for ref in refs]
comfy.model_management.unload_all_models()
result["nothing stays loaded"] = len(comfy.model_management.current_loaded_models)

# --- every latent format --------------------------------------------------------------------------------------------------------

import comfy.latent_formats as formats  # noqa: E402

described = {}
for name, cls in vars(formats).items():
    if isinstance(cls, type) and issubclass(cls, formats.LatentFormat):
        described[name] = str(checks.latents_of(cls()))
result["formats"] = described
