"""Runs inside ComfyUI (see inside.py): latents of other channels, and gradients that are no numbers, for rules on a MODEL."""

# ruff: noqa: ANN001, ANN201, ANN204
import torch
from inside import call, far, part, refused, result
from stage import Stage, cfg, classifier_for, noted, patch, rule

model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
latents = part("nodes.runtime.comfy.checks").latents_of(model.get_model_object("latent_format"))
classifier, broken = classifier_for(latents), classifier_for(latents)
stage = Stage(model, positive, negative, torch.zeros(2, 4, 8, 8))
strange = Stage(model, positive, negative, torch.ones(1, 3, 8, 8))
patched = patch(model, rule(classifier))


def by_node(model, latent):
    """By core's KSampler, which takes an empty latent for one of any channels."""
    inputs = {"seed": 5, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return call(
        "KSampler", model=model, positive=positive, negative=negative, latent_image={"samples": latent}, **inputs
    )[0]["samples"]


result["channels"] = {
    "CFGGuider": refused(lambda: strange.core(patched, 2.0)),
    "BasicGuider": refused(lambda: strange.basic(patched)),
    "behind KSampler": refused(lambda: strange.ksampler(patched, 2.0)),
    "KSampler": refused(lambda: by_node(patched, strange.latent)),
}
result["channels, no rule"] = refused(lambda: strange.core(model, 2.0))


class NotANumber:
    """A loss that is no number for some of a batch."""

    space = "latent"

    def __init__(self, broken):
        self.broken = broken

    def __call__(self, estimate):
        factor = torch.ones(len(estimate))
        factor[self.broken] = torch.nan
        return factor * estimate.square().flatten(1).sum(dim=1)


def mpgd(broken):
    return call("LGMPGD", loss=NotANumber(broken), guidance_scale=0.3)[0]


with torch.inference_mode(False), torch.no_grad():
    list(broken.network.parameters())[-1].fill_(torch.nan)
unguided = {
    "CFGGuider": stage.core(model, 2.0), "KSampler": by_node(model, stage.latent), "ours": stage.ours(cfg(2.0)),
}  # fmt: skip
result["not a number"] = {}
for name, rules in (
    ("loss", mpgd([0, 1])),
    ("half of the loss", mpgd([1])),
    ("classifier", rule(broken)),
    ("none", mpgd([])),
):
    guided = patch(model, rules)
    with noted() as warnings:
        found = {
            "CFGGuider": stage.core(guided, 2.0), "KSampler": by_node(guided, stage.latent),
            "ours": stage.ours(cfg(2.0), model=guided),
        }  # fmt: skip
    result["not a number"][name] = {
        "away": {
            way: [far(plain, again) for plain, again in zip(unguided[way], found[way], strict=True)] for way in found
        },
        "warnings": warnings,
    }
