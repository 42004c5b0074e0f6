"""Runs inside ComfyUI (see inside.py): CFG++ and recurrence under ours and core's guiders, beside core's own *_cfg_pp samplers."""

# ruff: noqa: ANN001, ANN003, ANN201
import json
import shutil
from pathlib import Path

import comfy.sample
import comfy.samplers
import folder_paths
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic
from inside import call, counted, far, part, refused, result

STEPS, SCALE = 5, 0.6
model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
latent = torch.zeros(2, 4, 8, 8)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)
make_noise = part("nodes.runtime.comfy.sampling").step_noise


def run(guider, sampler, x=noise, start=latent, **more):
    return guider.sample(x, start, sampler, sigmas, disable_pbar=True, seed=5, **more)


def ours(rules=(), guided=None, with_negative=True):
    inputs = dict(model=guided or model, positive=positive, negative=negative if with_negative else None)
    return call("LGGuider", **inputs, rules=rules)[0]


def core(scale=SCALE, guided=None):
    guider = comfy.samplers.CFGGuider(guided or model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


def basic():
    guider = Guider_Basic(model)
    guider.set_conds(positive)
    return guider


def cfg(scale=SCALE, rules=()):
    return call("LGCFG", guidance_scale=scale, rules=rules)[0]


def stock(name, **options):
    return comfy.samplers.ksampler(name, options)


(euler,) = call("LGSamplerDDIMCFGpp", eta=0.0)
(ancestral,) = call("LGSamplerDDIMCFGpp", eta=1.0)
(second,) = call("LGSamplerDPMpp2MCFGpp")
(plain,) = call("LGSamplerDDIM", eta=0.0)


def pairs():
    """Ours and core's; the ancestral one with the noise of ours."""
    theirs = stock("euler_ancestral_cfg_pp", noise_sampler=make_noise(5, latent))
    return {
        "euler": (euler, stock("euler_cfg_pp")),
        "ancestral": (ancestral, theirs),
        "2m": (second, stock("dpmpp_2m_cfg_pp")),
    }


for name, (own, theirs) in pairs().items():
    picture = run(core(), own)
    result[f"{name}: core's sampler"] = far(picture, run(core(), theirs))
    result[f"{name}: in our guider"] = far(picture, run(ours(cfg()), own))
    result[f"{name} is not plain"] = far(picture, run(core(), plain))
    result[f"{name} at scale 1"] = far(run(core(1.0), own), run(ours(), own))
    (patched,) = call("LGApplyGuidance", model=model, rules=cfg())
    result[f"{name}: rule on the model"] = far(picture, run(core(9.0, patched), own))
result["at scale 1, not plain"] = far(run(core(1.0), euler), run(core(1.0), plain))
for name in [name for name in comfy.samplers.KSAMPLER_NAMES if "cfg_pp" in name]:
    torch.manual_seed(7)
    picture = run(core(), stock(name))
    torch.manual_seed(7)
    result[f"core's {name} in our guider"] = far(picture, run(ours(cfg()), stock(name)))
    result[f"refused: core's {name} without a negative"] = refused(
        lambda name=name: run(ours(with_negative=False), stock(name))
    )
result["core takes zeros for a missing negative"] = refused(lambda: run(basic(), stock("euler_cfg_pp")))

damped = call("LGTangentialCFG", rules=cfg(), damping=1.0)[0]
(on_model,) = call("LGApplyGuidance", model=model, rules=call("LGTangentialCFG", rules=(), damping=1.0)[0])
picture = run(ours(damped), euler)
result["a rule that changes the negative: on the model"] = far(picture, run(core(SCALE, on_model), euler))
result["a rule that changes the negative: core's sampler"] = far(picture, run(ours(damped), stock("euler_cfg_pp")))
result["a rule that changes the negative acts"] = far(picture, run(ours(cfg()), euler))

mask = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)
start = comfy.sample.prepare_noise(latent, 77)
masked = [run(core(), sampler, start=start, denoise_mask=mask) for sampler in (euler, stock("euler_cfg_pp"))]
result["masked"] = far(*masked)

watched, batches = counted(model)
run(ours(cfg(1.0), watched), euler)
result["batches"] = batches[:]
batches.clear()
result["refused: our guider without a negative"] = refused(lambda: run(ours((), watched, with_negative=False), euler))
result["refused: basic"] = refused(lambda: run(basic(), euler))
(interval,) = call("LGLimitedInterval", sigma_lo=0.3, sigma_hi=5.0, rules=cfg())
result["refused: interval"] = refused(lambda: run(ours(interval, watched), euler))
(patched,) = call("LGApplyGuidance", model=watched, rules=interval)
result["refused: interval on the model"] = refused(lambda: run(core(1.0, patched), euler))
(rectified,) = call("LGSamplerRectifiedCFGpp", scale=3.0, gamma=0.0, predictor_noise=0.0)
result["refused: rectified on eps"] = refused(lambda: run(ours((), watched), rectified))
result["batches of what was refused"] = batches[:]
for name in [name for name in comfy.samplers.KSAMPLER_NAMES if "cfg_pp" in name]:
    result[f"refused: interval, core's {name}"] = refused(lambda name=name: run(ours(interval), stock(name)))
    result[f"refused: interval on the model, core's {name}"] = refused(
        lambda name=name: run(core(1.0, patched), stock(name))
    )
result["interval, no cfg++"] = refused(lambda: run(ours(interval), stock("euler")))

# --- recurrence --------------------------------------------------------------------------------------------------------

again = {"recurrence": 2, "recurrence_sigma_lo": 0.0, "recurrence_sigma_hi": 1000.0}
(twice,) = call("LGSamplerDDIM", eta=0.0, **again)
seen = []
picture = run(core(4.0), twice, callback=lambda step, *more: seen.append((step, more[-1])))
result["steps reported"] = seen
result["recurrence acts"] = far(picture, run(core(4.0), plain))
result["recurrence once"] = far(run(core(4.0), call("LGSamplerDDIM", eta=0.0, recurrence=1)[0]), run(core(4.0), plain))
(many,) = call("LGSeededNoise", seed=11, batch_size=2)
(single,) = call("LGSeededNoise", seed=12, batch_size=1)
for name, sampler in (("ddim", twice), ("cfg++", call("LGSamplerDDIMCFGpp", eta=1.0, **again)[0])):
    pair = core().sample(many.generate_noise({"samples": latent}), latent, sampler, sigmas, disable_pbar=True, seed=11)
    one = single.generate_noise({"samples": latent[:1]})
    alone = core().sample(one, latent[:1], sampler, sigmas, disable_pbar=True, seed=12)
    result[f"recurrence, {name}: item 1 of a batch, alone"] = far(alone, pair[1:])
    result[f"recurrence, {name}: items differ"] = far(pair[:1], pair[1:])

# --- rectified flow ------------------------------------------------------------------------------------------------------

root = Path(folder_paths.get_folder_paths("latent_guidance")[0])
flow_root = Path(folder_paths.get_temp_directory()) / "cfg_pp_models"
shutil.copytree(root / "tiny", flow_root / "flow_pp", dirs_exist_ok=True)
scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 2.0}
(flow_root / "flow_pp" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
folder_paths.add_model_folder_path("latent_guidance", str(flow_root))
model, _, _ = call("LGLoadCheckpoint", checkpoint="flow_pp")
grid = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
for name, first in (("from 1", 0), ("from below 1", 1)):
    sigmas = grid[first:]
    for kind, (own, theirs) in pairs().items():
        picture, other = run(core(), own), run(core(), theirs)
        result[f"flow {name}, {kind}: finite"] = bool(torch.isfinite(picture).all())
        result[f"flow {name}, {kind}: core's is finite"] = bool(torch.isfinite(other).all())
        result[f"flow {name}, {kind}: core's sampler"] = (
            far(picture, other) if bool(torch.isfinite(other).all()) else None
        )
sigmas = grid[1:3]  # one step, where the second order has no say
result["flow: one step of 2m is one of euler"] = far(run(core(), euler), run(core(), second))
result["flow: core's one step of 2m is one of euler"] = far(
    run(core(), stock("euler_cfg_pp")), run(core(), stock("dpmpp_2m_cfg_pp"))
)
sigmas = grid
watched, batches = counted(model)
picture = run(core(1.0, watched), rectified)
result["flow: batches of rectified"] = batches[:]
result["flow: rectified acts"] = far(picture, run(core(1.0), stock("euler")))
result["flow: rectified in our guider"] = far(picture, run(ours(), rectified))
result["flow: rectified under cfg"] = [
    refused(lambda: run(core(8.0), rectified)),
    refused(lambda: run(ours(cfg(4.0)), rectified)),
]
(neutral,) = call("LGSamplerRectifiedCFGpp", scale=0.0, gamma=0.0, predictor_noise=0.0)
result["flow: rectified at scale 0"] = far(run(core(1.0), neutral), run(core(1.0), stock("euler")))
