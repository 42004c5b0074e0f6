"""Runs inside ComfyUI (see inside.py): guidance as GUIDER and as MODEL patch, under core's own guiders and KSampler."""

# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN204
import copy
import json
import shutil
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic
from inside import call, far, part, refused, result

STEPS = 6
model, clip, vae = call("LGLoadCheckpoint", checkpoint="tiny")
classifier, labels = call("LGLoadClassifier", classifier="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
latent = torch.zeros(2, 4, 8, 8)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)


def rule(rules=(), label="Flags", scale=60.0, **more):
    inputs = dict(
        label=label, guidance_scale=scale, combine="any", sigma_lo=0.0, sigma_hi=1000.0, every_k=1, clip=1000.0
    )
    inputs |= dict(scaling="raw", form="score")
    return call("LGClassifierGuidance", classifier=classifier, rules=rules, **(inputs | more))[0]


def cfg(scale, rules=()):
    return call("LGCFG", guidance_scale=scale, rules=rules)[0]


def interval(low, high, rules=()):
    return call("LGLimitedInterval", sigma_lo=low, sigma_hi=high, rules=rules)[0]


def patch(patched, rules):
    return call("LGApplyGuidance", model=patched, rules=rules)[0]


def run(guider, sampler="euler", callback=None, seed=5, x=noise, start=latent):
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return guider.sample(x, start, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed)


def ours(rules=(), guided=None, with_negative=True, **more):
    guided = model if guided is None else guided
    guider, _ = call(
        "LGGuider", model=guided, positive=positive, negative=negative if with_negative else None, rules=rules
    )
    return run(guider, **more)


def basic(guided, **more):
    guider = Guider_Basic(guided)
    guider.set_conds(positive)
    return run(guider, **more)


def core(guided, scale, **more):
    guider = comfy.samplers.CFGGuider(guided)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return run(guider, **more)


def ksampler(guided, scale, sampler="euler"):
    return comfy.sample.sample(
        guided, noise, STEPS, scale, sampler, "karras", positive, negative, latent, seed=5, disable_pbar=True
    )


plain = basic(model)
one = ours(rule(), with_negative=False)
result["labels"] = labels.splitlines()
result["finite"] = bool(torch.isfinite(one).all())
result["guided differs"] = far(plain, one)
result["no rules"] = far(plain, ours(with_negative=False))
result["again"] = far(one, ours(rule(), with_negative=False))
result["basic"] = far(one, basic(patch(model, rule())))
result["cfg 1"] = far(one, core(patch(model, rule()), 1.0))
result["ksampler 1"] = far(one, ksampler(patch(model, rule()), 1.0))
result["clone of a patch"] = far(one, basic(patch(model, rule()).clone()))
result["the model is left alone"] = far(plain, basic(model))

result["our cfg is core's"] = far(core(model, 4.0), ours(cfg(4.0)))
both = ours(rule(cfg(4.0)))
result["cfg and classifier: patch of both"] = far(both, core(patch(model, rule(cfg(4.0))), 7.0))
result["cfg and classifier: patch of both, ksampler"] = far(both, ksampler(patch(model, rule(cfg(4.0))), 1.0))
result["cfg and classifier: core's cfg"] = far(both, core(patch(model, rule()), 4.0))
result["cfg and classifier: cfg in guider, classifier on model"] = far(both, ours(cfg(4.0), patch(model, rule())))
result["cfg and classifier: heun"] = far(
    ours(rule(cfg(4.0)), sampler="heun"), ksampler(patch(model, rule()), 4.0, "heun")
)
result["cfg and classifier is not cfg"] = far(both, core(model, 4.0))

middle = float(sigmas[STEPS // 2])
narrow = ours(interval(middle, 1000.0, cfg(4.0)))
result["interval: patch"] = far(narrow, ksampler(patch(model, interval(middle, 1000.0)), 4.0))
result["interval is not cfg"] = far(narrow, core(model, 4.0))

first, second = rule(), rule(label="Food & Drink", scale=80.0)
chain = ours(rule(first, label="Food & Drink", scale=80.0), with_negative=False)
result["chain: not the first"] = far(chain, one)
result["chain: not the second"] = far(chain, ours(second, with_negative=False))
result["chain: two patches"] = far(chain, basic(patch(patch(model, first), second)))
result["chain: guider and patch"] = far(chain, ours(second, patch(model, first), with_negative=False))

# --- hooks of other nodes, before and after ours --------------------------------------------------------------------


def with_cfg_function(guided):
    out = guided.clone()
    out.set_model_sampler_cfg_function(lambda a: a["uncond"] + 0.5 * (a["cond"] - a["uncond"]) * a["cond_scale"])
    return out


def with_pre(guided):
    out = guided.clone()
    out.set_model_sampler_pre_cfg_function(lambda a: [0.9 * part for part in a["conds_out"]])
    return out


def with_post(guided):
    out = guided.clone()
    out.set_model_sampler_post_cfg_function(
        lambda a: 0.9 * a["denoised"] + 0.05 * a["uncond_denoised"], disable_cfg1_optimization=True
    )
    return out


result["cfg function acts"] = far(core(model, 4.0), core(with_cfg_function(model), 4.0))
result["cfg function: patch order"] = far(
    core(patch(with_cfg_function(model), rule()), 4.0), core(with_cfg_function(patch(model, rule())), 4.0)
)
result["cfg function: in our guider"] = far(core(with_cfg_function(model), 1.0), ours(guided=with_cfg_function(model)))
result["pre hook: in our guider"] = far(core(with_pre(model), 4.0), ours(cfg(4.0), with_pre(model)))
result["post hook: in our guider"] = far(core(with_post(model), 4.0), ours(cfg(4.0), with_post(model)))
result["post hook: at scale 1"] = far(core(with_post(model), 1.0), ours(guided=with_post(model)))
result["post hook acts"] = far(core(model, 4.0), core(with_post(model), 4.0))
result["post hook before ours"] = far(core(with_post(patch(model, rule())), 4.0), core(with_post(model), 4.0))
result["post hook kept by our patch"] = far(core(patch(with_post(model), rule()), 4.0), core(patch(model, rule()), 4.0))

# --- network calls ----------------------------------------------------------------------------------------------------


def counted(rules, **more):
    batches = []
    out = model.clone()
    out.set_model_unet_function_wrapper(
        lambda f, a: (batches.append(len(a["input"])), f(a["input"], a["timestep"], **a["c"]))[1]
    )
    ours(rules, out, **more)
    return batches


result["batches: plain"] = counted(())
result["batches: cfg"] = counted(cfg(4.0))
result["batches: interval"] = counted(interval(middle, 1000.0, cfg(4.0)))
result["batches: classifier"] = counted(rule())

# --- samplers of the pack ---------------------------------------------------------------------------------------------

(ddim,) = call("LGSamplerDDIM", eta=0.0)
mask = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)


def masked(sampler):
    guider, _ = call("LGGuider", model=model, positive=positive)
    start = comfy.sample.prepare_noise(latent, 77)
    return guider.sample(noise, start, sampler, sigmas, denoise_mask=mask, disable_pbar=True, seed=5)


result["ddim is euler, masked"] = far(masked(comfy.samplers.sampler_object("euler")), masked(ddim))
result["the mask acts"] = far(masked(ddim), ours(with_negative=False))
result["ddim is euler"] = far(ours(cfg(4.0)), ours(cfg(4.0), sampler=ddim))


def mean_shift(rules=(), node="LGClassifierMeanShift", scale=20.0):
    inputs = dict(
        label="Flags", guidance_scale=scale, combine="any", sigma_lo=0.0, sigma_hi=1000.0, every_k=1, clip=1000.0
    )
    inputs |= dict(scaling="raw") | (dict(at="x_t") if node == "LGClassifierMeanShift" else {})
    return call(node, classifier=classifier, rules=rules, **inputs)[0]


def ddpm(rules=(), variance="beta"):
    return call("LGSamplerDDPM", variance=variance, rules=rules)[0]


undirected = ours(sampler=ddpm(), with_negative=False)
shifted = ours(sampler=ddpm(mean_shift()), with_negative=False)
result["ddpm is finite"] = bool(torch.isfinite(undirected).all() and torch.isfinite(shifted).all())
result["mean shift acts"] = far(undirected, shifted)
result["mean shift twice acts twice"] = far(shifted, ours(sampler=ddpm(mean_shift(mean_shift())), with_negative=False))
post_step = ddpm(mean_shift(node="LGClassifierPostStep", scale=50.0))
result["post step acts"] = far(undirected, ours(sampler=post_step, with_negative=False))
(many,) = call("LGSeededNoise", seed=11, batch_size=2)
(single,) = call("LGSeededNoise", seed=12, batch_size=1)
pair = ours(sampler=ddpm(), x=many.generate_noise({"samples": latent}), seed=many.seed, with_negative=False)
alone = ours(
    sampler=ddpm(),
    x=single.generate_noise({"samples": latent[:1]}),
    start=latent[:1],
    seed=single.seed,
    with_negative=False,
)
result["item 1 of a batch, alone"] = far(alone, pair[1:])
result["items differ"] = far(pair[:1], pair[1:])
fresh = many.generate_noise({"samples": latent})
result["step noise is not the initial noise"] = far(
    part("nodes.runtime.comfy.sampling").step_noise(11, fresh)(1.0, 0.5), fresh
)

# --- refusals -----------------------------------------------------------------------------------------------------------

result["refused: cfg without negative"] = refused(lambda: ours(cfg(4.0), with_negative=False))
result["refused: cfg under BasicGuider"] = refused(lambda: basic(patch(model, cfg(4.0))))
for name, action in {
    "cfg after a classifier, on the model": lambda: patch(patch(model, rule()), cfg(4.0)),
    "interval after a classifier, on the model": lambda: patch(patch(model, rule()), interval(middle, 1000.0)),
    "cfg on the model, a classifier in the guider": lambda: ours(rule(), patch(model, cfg(4.0))),
    "interval on the model, a classifier in the guider": lambda: ours(
        rule(cfg(4.0)), patch(model, interval(middle, 1000.0))
    ),
}.items():
    result[f"lost: {name}"] = refused(action)
result["cfg and classifier: cfg, then classifier, on the model"] = far(
    both, core(patch(patch(model, cfg(4.0)), rule()), 7.0)
)
result["refused: unknown label"] = refused(lambda: rule(label="dragons"))
result["refused: guider rule in sampler"] = refused(lambda: ddpm(rule()))
result["refused: sampler rule in guider"] = refused(lambda: ours(mean_shift(), with_negative=False))
result["refused: classifier in both"] = refused(lambda: ours(rule(), sampler=ddpm(mean_shift()), with_negative=False))
result["refused: classifier on the model and in the sampler"] = refused(
    lambda: basic(patch(model, rule()), sampler=ddpm(mean_shift()))
)
result["refused: same rule twice"] = refused(lambda: ours(rule(), patch(model, rule()), with_negative=False))
result["refused: two cfg rules"] = refused(lambda: ours(cfg(2.0, cfg(4.0))))
result["refused: noise for another batch"] = refused(lambda: single.generate_noise({"samples": latent}))
result["refused: picture size"] = refused(
    lambda: call("LGVAEEncode", image=torch.rand(1, 65, 64, 3), vae=vae, posterior="mode", seed=0)
)
result["refused: latent channels"] = refused(
    lambda: call("LGVAEDecode", samples={"samples": torch.zeros(1, 5, 8, 8)}, vae=vae)
)
result["refused: unknown checkpoint"] = refused(lambda: call("LGLoadCheckpoint", checkpoint="nothing"))


class Other:
    def __init__(self, **changes):
        vars(self).update(
            {name: getattr(classifier.config, name) for name in classifier.config.__dataclass_fields__} | changes
        )


stranger = copy.copy(classifier)
stranger.config = Other(scaling_factor=0.18215, latent_space="Stable Diffusion 1")
own, classifier = classifier, stranger
result["refused: classifier of other latents"] = refused(lambda: ours(rule(), with_negative=False))
result["refused: on the model too"] = refused(lambda: patch(model, rule()))
classifier = own

# --- memory, inference tensors, interrupts ---------------------------------------------------------------------------------

seen = []
ours(
    rule(),
    with_negative=False,
    callback=lambda *_: seen.append(
        any(m.is_clone(classifier.patcher) for m in comfy.model_management.loaded_models())
    ),
)
result["classifier is managed while sampling"] = all(seen) and len(seen) == STEPS
comfy.model_management.unload_all_models()
classifier.network.to(torch.float64).to(torch.float32)  # inference mode makes these inference tensors
result["inference tensors"] = any(p.is_inference() for p in classifier.network.parameters())
result["after unloading"] = far(one, ours(rule(), with_negative=False))

steps = []


def stop(step, *_):
    steps.append(step)
    if step == 1:
        comfy.model_management.interrupt_current_processing(True)


result["interrupted: guider"] = refused(lambda: ours(rule(), with_negative=False, callback=stop)).split(":")[0]
result["steps until interrupted"] = len(steps)
steps.clear()
comfy.model_management.interrupt_current_processing(False)
result["interrupted: ddpm"] = refused(lambda: basic(model, sampler=ddpm(), callback=stop)).split(":")[0]
result["ddpm steps until interrupted"] = len(steps)
comfy.model_management.interrupt_current_processing(False)

# --- rectified flow ---------------------------------------------------------------------------------------------------------

root = Path(folder_paths.get_folder_paths("latent_guidance")[0])
flow_root = Path(folder_paths.get_temp_directory()) / "flow_models"
shutil.copytree(root / "tiny", flow_root / "flow", dirs_exist_ok=True)
scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 2.0}
(flow_root / "flow" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
folder_paths.add_model_folder_path("latent_guidance", str(flow_root))
model, _, _ = call("LGLoadCheckpoint", checkpoint="flow")
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
result["flow: first sigma"] = float(sigmas[0])
result["flow: process"] = part("nodes.runtime.comfy.guider").process_of(model.get_model_object("model_sampling")).name
guided = ours(rule(scale=5.0), with_negative=False)
result["flow: finite"] = bool(torch.isfinite(guided).all())
result["flow: guided differs"] = far(basic(model), guided)
result["flow: patch"] = far(guided, basic(patch(model, rule(scale=5.0))))
result["flow: ddpm"] = bool(torch.isfinite(ours(sampler=ddpm(mean_shift()), with_negative=False)).all())
