"""Runs inside ComfyUI (see inside.py): reports of guided runs, and the passes that a guider says against those it makes."""

# ruff: noqa: ANN001, ANN201
import json

import comfy.sample
import comfy.samplers
import stage
import torch
from inside import call, counted, far, part, refused, result

STEPS = 4
BATCH = 2
passes_of = part("nodes.runtime.comfy.guider").guider_passes
model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
classifier = call("LGLoadClassifier", classifier="tiny")[0]
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(middle,) = call("LGTextEncode", clip=clip, text="a flag")
(negative,) = call("LGNullConditioning", clip=clip)
latent = torch.zeros(BATCH, 4, 8, 8)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)


def sampled(guider, sampler="euler"):
    return guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=5)


def guider_of(rules=(), guided=model, report=True, prompt=positive):
    return call("LGGuider", model=guided, positive=prompt, negative=negative, rules=rules, report=report)


def table(samples):
    return json.loads(call("LGGuidanceReport", latent={"samples": samples})[1])["chains"]


(cfg,) = call("LGCFG", guidance_scale=4.0)
(interval,) = call("LGLimitedInterval", sigma_lo=float(sigmas[3]), sigma_hi=1000.0, rules=cfg)
classify = dict(combine="any", sigma_lo=0.0, sigma_hi=1000.0, every_k=1, clip=1000.0, scaling="raw", form="score")
(both,) = call("LGClassifierGuidance", classifier=classifier, label="Flags", guidance_scale=20.0, rules=cfg, **classify)
(two,) = call("LGTwoConditions", condition=[*middle, *positive], first_scale=1.5, second_scale=4.0, form="nested")

# --- passes -----------------------------------------------------------------------------------------------------------

hooked = model.clone()
hooked.set_model_sampler_post_cfg_function(lambda a: a["denoised"], disable_cfg1_optimization=True)
result["passes"] = {}
for name, rules, guided, prompt in (
    ("nothing", (), model, positive),
    ("nothing, but another node wants the negative", (), hooked, positive),
    ("cfg", cfg, model, positive),
    ("cfg, a prompt of two parts", cfg, model, [*positive, *middle]),
    ("interval", interval, model, positive),
    ("a classifier too", both, model, positive),
    ("two conditions, one of two parts", two, model, positive),
):
    watched, calls = counted(guided)
    guider, text = guider_of(rules, watched, prompt=prompt)
    samples = sampled(guider)
    said = passes_of(guider, sigmas)
    [chain] = table(samples)
    result["passes"][name] = [said.total, sum(calls) / BATCH, chain["passes"], text]

# --- a network that changes its activations in place -------------------------------------------------------------------------

(toward,) = call("LGLossReference", reference={"samples": torch.ones(1, 4, 8, 8)})
(through,) = call("LGDPS", loss=toward, guidance_scale=0.3, rules=cfg)
changed = stage.core_node(model, "nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)
result["in place"] = {}
for name, guided in (("as it is", model), ("with FreeU", changed)):
    watched, calls = counted(guided)
    guider, text = guider_of(through, watched)
    samples = sampled(guider)
    said = passes_of(guider, sigmas)
    [chain] = table(samples)
    result["in place"][name] = [
        said.total,
        sum(calls) / BATCH,
        chain["passes"],
        [row["passes"] for row in chain["rows"]],
        text,
    ]

# --- reports ----------------------------------------------------------------------------------------------------------

first, second = sampled(guider_of(cfg)[0]), sampled(guider_of(both)[0], "heun")
plot, _ = call("LGGuidanceReport", latent={"samples": first})
result["plot"] = list(plot.shape)
result["first"], result["second"] = table(first), table(second)
result["a copy is found"] = table(first.clone()) == table(first)
result["same picture"] = far(first, sampled(guider_of(cfg, report=False)[0]))
result["refused"] = refused(lambda: table(first + 1))

(patched,) = call("LGApplyGuidance", model=model, rules=both[1:], report=True)
stock = comfy.sample.sample(
    patched, noise, STEPS, 4.0, "euler", "karras", positive, negative, latent, seed=5, disable_pbar=True
)
result["on the model"] = table(stock)
step = dict(combine="any", sigma_lo=0.0, sigma_hi=1000.0, every_k=1, clip=1000.0, scaling="raw", at="x_t")
(shift,) = call("LGClassifierMeanShift", classifier=classifier, label="Flags", guidance_scale=20.0, **step)
(ddpm,) = call("LGSamplerDDPM", variance="beta", rules=shift)


def by_ddpm(guider):
    return guider.sample(noise, latent, ddpm, sigmas, disable_pbar=True, seed=5)


result["in the steps"] = table(by_ddpm(guider_of(cfg)[0]))
result["in the steps: same picture"] = far(by_ddpm(guider_of(cfg)[0]), by_ddpm(guider_of(cfg, report=False)[0]))
(on_model,) = call("LGApplyGuidance", model=model, rules=call("LGRescaleGuidance", phi=0.7)[0], report=True)
core = comfy.samplers.CFGGuider(on_model)
core.set_conds(positive, negative)
core.set_cfg(4.0)
result["in the steps, on the model"] = table(by_ddpm(core))
result["in the steps, guider and model"] = table(by_ddpm(guider_of(cfg, on_model)[0]))
result["nothing stays on a guider"] = [name for name in vars(core) if "latent_guidance" in name]
result["guider and model"] = table(sampled(guider_of(cfg, patched)[0]))
