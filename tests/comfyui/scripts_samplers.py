"""Runs inside ComfyUI (see inside.py): every sampler with every scheduler that it offers, guided and not.

Before it stand two lines: SAMPLERS and SCHEDULERS, the names to try, or None for all.
"""

# ruff: noqa: ANN001, ANN002, ANN201, F821
import comfy.model_management
import comfy.samplers
import stage
import torch
from inside import call, far, part, result

MOST_CALLS = 300
"""Calls of the network after which a run is given up; dpm_adaptive picks its own steps."""

model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
latents = part("nodes.runtime.comfy.checks").latents_of(model.model.latent_format)
classifier = stage.classifier_for(latents)
rule, both = stage.rule(classifier), stage.rule(classifier, stage.cfg(2.0))

calls = []


def limited(apply_model, args):
    calls.append(len(args["input"]))
    if len(calls) > MOST_CALLS:
        raise TimeoutError(f"more than {MOST_CALLS} calls of the network")
    return apply_model(args["input"], args["timestep"], **args["c"])


model = model.clone()
model.set_model_unet_function_wrapper(limited)
patched, weaker = stage.patch(model, rule), stage.patch(model, stage.rule(classifier, scale=0.2))


def counted(sample, guided, *more):
    calls.clear()
    return sample(guided, *more), len(calls)


def measured(sampler, scheduler):
    """One sampler with one scheduler: guider against patch, and against no rule."""
    here = stage.Stage(
        model, positive, negative, torch.zeros(1, 4, 4, 4), steps=4, scheduler=scheduler, sampler=sampler
    )
    try:
        (guided, mine), (by_patch, theirs) = counted(here.ours, both), counted(here.core, patched, 2.0)
        plain, _ = counted(here.core, model, 2.0)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finite = bool(torch.isfinite(guided).all() and torch.isfinite(plain).all())
    differences = {"patch": far(guided, by_patch), "guided differs": far(plain, guided)}
    return {"error": "", "finite": finite, "calls": [mine, theirs], **differences}


names = comfy.samplers.KSampler.SAMPLERS if SAMPLERS is None else SAMPLERS
schedulers = comfy.samplers.KSampler.SCHEDULERS if SCHEDULERS is None else SCHEDULERS
result["offered"] = [list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)]
result["runs"] = {f"{name}, {scheduler}": measured(name, scheduler) for name in names for scheduler in schedulers}
here = stage.Stage(model, positive, negative, torch.zeros(1, 4, 4, 4), steps=4)
result["a weaker rule is another picture"] = far(here.ours(both), here.core(weaker, 2.0))
