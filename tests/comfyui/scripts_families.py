"""Runs inside ComfyUI (see inside.py): a family of models through the stock loaders, sampled and guided.

Before it stand three lines: FAMILY, a name in families.py; FILES, the folder of the families' files; WEIGHTS, the kinds of weights to
try through UNETLoader. (ComfyUI computes in fp32 on a CPU, however the weights are stored.)
"""

# ruff: noqa: ANN001, ANN201, F821
import comfy.cli_args
import comfy.latent_formats
import comfy.samplers
import families
import stage
import torch
from inside import call, far, part, refused, result

family = families.FAMILIES[FAMILY]
file = families.make(FAMILY, FILES)
clip = vae = None
if family.checkpoint:
    model, clip, vae = call("CheckpointLoaderSimple", ckpt_name=file)
else:
    (model,) = call("UNETLoader", unet_name=file, weight_dtype="default")
checks, guiders = part("nodes.runtime.comfy.checks"), part("nodes.runtime.comfy.guider")
latents = checks.latents_of(model.model.latent_format)
process = guiders.process_of(model.get_model_object("model_sampling"))
result["detected"] = [type(part_).__name__ for part_ in (model.model.model_config, model.model)]
result["process"], result["latents"] = process.name, str(latents)
result["is detected as"] = [family.detected, family.model]

positive, negative = families.condition(FAMILY, 1), families.condition(FAMILY, 2)
latent = torch.zeros(1, latents.channels, 8, 8)
here = stage.Stage(model, positive, negative, latent)
classifier = stage.classifier_for(latents)
rule = stage.rule(classifier)

# --- guidance --------------------------------------------------------------------------------------------------------------

plain = here.core(model, 4.0)
result["our cfg is core's"] = far(plain, here.ours(stage.cfg(4.0)))
result["first sigma"] = float(here.sigmas[0])
with stage.noted() as warnings:
    guided = here.ours(stage.rule(classifier, stage.cfg(4.0)))
    only = here.ours(rule, negative=False)
result["warnings"], result["finite"] = warnings, bool(torch.isfinite(guided).all() and torch.isfinite(only).all())
result["guided differs"] = far(plain, guided)
patched = stage.patch(model, rule)
result["patch: cfg guider"] = far(guided, here.core(patched, 4.0))
result["patch: ksampler"] = far(guided, here.ksampler(patched, 4.0))
result["patch: basic guider"] = far(only, here.basic(patched))
unguided = here.basic(model)
result["the model is left alone"] = far(unguided, here.ours((), negative=False))
result["guided differs: prompt alone"] = far(unguided, only)

# --- rules that follow a loss ----------------------------------------------------------------------------------------------------

target = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
loss = call("LGLossReference", reference={"samples": target})[0]
leaf = call("LGMPGD", loss=loss, guidance_scale=0.3)[0]


def followed(unguided, guided):
    """Whether it is finite, how far from unguided, and what is left of the loss."""
    return [bool(torch.isfinite(guided).all()), far(unguided, guided), float(loss(guided) / loss(unguided))]


dps = call("LGDPS", loss=loss, guidance_scale=0.3, rules=stage.cfg(4.0))[0]
with stage.noted() as warnings:
    pulled = here.ours((*stage.cfg(4.0), *leaf))
    result["MPGD: patch"] = far(pulled, here.core(stage.patch(model, leaf), 4.0))
    result["MPGD"], result["DPS"] = followed(plain, pulled), followed(plain, here.ours(dps))
result["loss: warnings"] = warnings

# --- core's skip-layer nodes, which are for transformers ---------------------------------------------------------------------------

result["skip layers"] = {}
window = dict(start_percent=0.0, end_percent=1.0)
raw = dict(
    scale=40.0, scaling="raw"
)  # relative to an estimate with the node's part (on the model) or without it (in a guider)
for module, node, inputs in (
    ("nodes_slg", "SkipLayerGuidanceDiT", dict(double_layers="0", single_layers="0", scale=2.0)),
    ("nodes_slg", "SkipLayerGuidanceDiTSimple", dict(double_layers="0", single_layers="0")),
    ("nodes_sd3", "SkipLayerGuidanceSD3", dict(layers="0", scale=2.0)),
) if family.flow else ():  # fmt: skip
    skipping = stage.core_node(model, module, node, **inputs, **window)
    alone = here.core(skipping, 4.0)
    result["skip layers"][node] = {
        "acts": far(plain, alone), "our cfg is core's": far(alone, here.ours(stage.cfg(4.0), skipping)),
        "patch": far(
            here.ours(stage.rule(classifier, stage.cfg(4.0), **raw), skipping),
            here.core(stage.patch(skipping, stage.rule(classifier, **raw)), 4.0),
        ),
        "beside": {
            name: [bool(torch.isfinite(both).all()), far(alone, both), far(here.ours(rules), both)]
            for name, rules in (
                ("classifier", stage.rule(classifier, stage.cfg(4.0))), ("MPGD", (*stage.cfg(4.0), *leaf)), ("DPS", dps),
                ("CFG-Zero*", call("LGCFGZeroStar", guidance_scale=4.0)[0]),
                ("Skipped Layers", call("LGSkippedLayers", rules=stage.cfg(4.0))[0]),
            )
            for both in [here.ours(rules, skipping)]
        },
    }  # fmt: skip

# --- the identity, and what is not it ---------------------------------------------------------------------------------------

level, scale = (0.6, 40.0) if family.flow else (2.0, 40.0)
alpha = 1 - level if family.flow else 1.0
x = alpha * torch.randn(1, latents.channels, 8, 8) + level * here.noise
added = here.estimate(stage.rule(classifier, scale=scale, scaling="raw"), x, level) - here.estimate((), x, level)
with torch.inference_mode(False):
    leaf = x.clone().requires_grad_()
    root = (alpha**2 + level**2) ** 0.5
    logits = classifier.network(leaf / root, torch.tensor([2 * torch.tensor(alpha / level).log().item()]))
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), leaf)
result["identity"] = far(scale * level**2 / alpha * gradient, added)
result["naive form"] = far(scale * level**2 * gradient, added)
if family.flow:
    start = here.estimate(stage.rule(classifier, scale=scale, scaling="raw"), here.noise, 1.0)
    result["at alpha = 0 nothing is added"] = far(here.estimate((), here.noise, 1.0), start)

# --- classifiers of other latents --------------------------------------------------------------------------------------------

others = [getattr(comfy.latent_formats, name)() for name in ("SD15", "SDXL", "SD3", "Flux", "SDXL_Playground_2_5")]
result["refused"] = {}
for format in others:
    other = checks.latents_of(format)
    if other != latents:
        strange = stage.rule(stage.classifier_for(other))
        result["refused"][other.name] = [
            refused(lambda rules=strange: here.guider(rules)), refused(lambda rules=strange: stage.patch(model, rules))
        ]  # fmt: skip
result["a latent of other channels"] = refused(
    lambda: here.guider(rule).sample(
        torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), comfy.samplers.sampler_object("euler"), here.sigmas, disable_pbar=True
    )
)  # fmt: skip

# --- a whole checkpoint: its own text encoder and VAE -------------------------------------------------------------------------

if family.whole:
    prompts = [call("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a red apple", "")]
    whole = stage.Stage(model, *prompts, latent, scheduler="karras", sampler="dpmpp_2m")
    pictures = [
        call("VAEDecode", vae=vae, samples={"samples": samples})[0]
        for samples in (whole.ksampler(patched, 4.0), whole.ksampler(model, 4.0), whole.ours(rule, negative=False))
    ]
    result["picture"] = [list(pictures[0].shape), bool(all(torch.isfinite(picture).all() for picture in pictures))]
    result["picture differs"] = far(*pictures[:2])

# --- other weights -----------------------------------------------------------------------------------------------------------

result["weights"] = {}
for name in WEIGHTS:
    options = {"fp32": "fp32_unet", "fp16": "fp16_unet", "bf16": "bf16_unet"}
    if name in options:  # as ComfyUI is started with --fp16-unet and the like
        setattr(comfy.cli_args.args, options[name], True)
    (loaded,) = call("UNETLoader", unet_name=file, weight_dtype="default" if name in options else name)
    setattr(comfy.cli_args.args, options.get(name, "none"), False)
    small = stage.Stage(loaded, positive, negative, latent)
    with stage.noted() as warnings:
        mine = small.ours(stage.rule(classifier, stage.cfg(4.0)))
        theirs = small.core(stage.patch(loaded, rule), 4.0)
    unguided = small.core(loaded, 4.0)
    result["weights"][name] = {
        "stored in": str(loaded.model_dtype()).removeprefix("torch."), "finite": bool(torch.isfinite(mine).all()),
        "patch": far(mine, theirs), "cfg": far(unguided, small.ours(stage.cfg(4.0))), "warnings": warnings,
        "guided differs": far(unguided, mine), "dtype": str(mine.dtype), "DPS": followed(unguided, small.ours(dps)),
    }  # fmt: skip
