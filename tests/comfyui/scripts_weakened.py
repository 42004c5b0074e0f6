"""Runs inside ComfyUI (see inside.py): weakened passes, beside core's own nodes for the same and beside the library."""

# ruff: noqa: ANN001, ANN003, ANN201, ANN202
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import folder_paths
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from inside import call, far, part, refused, result

checkpoint = part("latent_guidance.models.checkpoint")
files = part("latent_guidance.models.files")
units = part("latent_guidance.models.unet")
guidance = part("latent_guidance.guidance")
loader = part("nodes.runtime.comfy.model")

STEPS = 3
model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
latent = torch.zeros(2, 4, 8, 12)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)
RULES = {
    "identity": ("LGPerturbedAttention", {"layers": "middle"}),
    "identity, other layers": ("LGPerturbedAttention", {"layers": "d0, u1"}),
    "blur": ("LGSmoothedEnergy", {"layers": "all", "blur_sigma": 1.0}),
    "blur without limit": ("LGSmoothedEnergy", {}),
    "skip": ("LGSkippedLayers", {"layers": "m0, u0"}),
    "shuffle": ("LGTokenPerturbation", {"layers": "all", "seed": 3}),
    "windows": ("LGSlidingWindow", {"size": 0.7}),
}


def sampled(guider, start=noise, x=latent, levels=sigmas):
    return guider.sample(start, x, comfy.samplers.sampler_object("euler"), levels, disable_pbar=True, seed=5)


def rules_of(node, inputs, scale=2.0, rules=(), **more):
    return call(node, **{"scale": scale, "rules": rules, **inputs, **more})[0]


def guider_of(rules, guided=model, cond=positive, empty=negative):
    return call("LGGuider", model=guided, positive=cond, negative=empty, rules=rules)[0]


def core_cfg(guided, scale=4.0, cond=positive, empty=negative):
    guider = comfy.samplers.CFGGuider(guided)
    guider.set_conds(cond, empty)
    guider.set_cfg(scale)
    return guider


def cfg(scale=4.0, rules=()):
    return call("LGCFG", guidance_scale=scale, rules=rules)[0]


def on_model(rules, guided=model):
    return call("LGApplyGuidance", model=guided, rules=rules)[0]


# --- core's own PAG -----------------------------------------------------------------------------------------------

pag = rules_of("LGPerturbedAttention", {})
core = sampled(core_cfg(PerturbedAttentionGuidance.execute(model, 2.0).result[0]))
plain = sampled(core_cfg(model))
both = sampled(guider_of(cfg(rules=pag)))
result["pag: guider is core's node"] = far(core, both)
result["pag: on a model is core's node"] = far(core, sampled(core_cfg(on_model(pag))))
result["pag: on a model in our guider"] = far(core, sampled(guider_of(cfg(), on_model(pag))))
core = sampled(core_cfg(PerturbedAttentionGuidance.execute(model, 2.0).result[0], 1.0))
result["pag: without cfg is core's node"] = far(core, sampled(guider_of(pag, empty=None)))
result["pag: again"] = far(both, sampled(guider_of(cfg(rules=pag))))
result["pag: neutral is cfg"] = far(plain, sampled(guider_of(cfg(rules=rules_of("LGPerturbedAttention", {}, 0.0)))))
result["pag: neutral on a model"] = far(plain, sampled(core_cfg(on_model(rules_of("LGPerturbedAttention", {}, 0.0)))))
result["pag differs: from cfg"] = far(plain, both)
result["pag differs: other layers"] = far(
    both, sampled(guider_of(cfg(rules=rules_of("LGPerturbedAttention", {"layers": "all"}))))
)
bare = model.model.diffusion_model.modules()
result["nothing stays behind"] = all(not module._forward_hooks and not module._forward_pre_hooks for module in bare)
result["nothing stays in the options"] = "patches_replace" not in model.model_options.get("transformer_options", {})

# --- every rule beside the library, in ComfyUI's own network and in the wrapped one -------------------------------------

folder = Path(folder_paths.get_folder_paths("latent_guidance")[0]) / "tiny"
scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json")
unet = checkpoint.load_unet(folder / "unet")
wrapped = loader.wrapped_model(unet, scheduler, loader.LatentSpace(4, 0.8, lambda: None))
denoiser = units.network_denoiser(checkpoint.load_unet(folder / "unet"), scheduler)
x = noise * 3.0
level = sigmas[1:2].expand(2)


def estimate(guider):
    """What a guider answers for x at one level."""
    found = []

    def take(step_model, start, levels, extra_args=None, **_):
        found.append(step_model(x, level, **extra_args))
        return start

    guider.sample(noise, latent, comfy.samplers.KSAMPLER(take), sigmas, disable_pbar=True, seed=5)
    return found[0]


tokens = positive[0][0].float()
unguided = estimate(guider_of((), empty=None))
for name, (node, inputs) in RULES.items():
    rules = rules_of(node, inputs)
    library = guidance.Guider(denoiser, rules).begin(sigmas)(x, level, tokens)
    result[f"{name}: the library's"] = far(library, estimate(guider_of(rules, empty=None)))
    result[f"{name}: wrapped"] = far(library, estimate(guider_of(rules, wrapped, empty=None)))
    result[f"{name}: on a model"] = far(library, estimate(core_cfg(on_model(rules), 1.0)))
    result[f"{name} differs: from the model"] = far(unguided, library)
joined = positive + call("LGTextEncode", clip=clip, text="snow")[0]
for name in ("shuffle", "skip", "windows"):
    rules = rules_of(*RULES[name])
    twice = estimate(guider_of(rules, cond=positive + positive, empty=None))
    result[f"{name}: two equal entries"] = far(estimate(guider_of(rules, empty=None)), twice)
    result[f"{name} differs: two entries"] = far(twice, estimate(guider_of(rules, cond=joined, empty=None)))

sizes = []
watched = model.clone()


def wrapper(apply_model, args):
    sizes.append(list(args["input"].shape))
    return apply_model(args["input"], args["timestep"], **args["c"])


watched.set_model_unet_function_wrapper(wrapper)
one = sigmas[-2:]
for name in ("identity", "windows"):
    sizes.clear()
    sampled(guider_of(cfg(rules=rules_of(*RULES[name])), watched), levels=one)
    result[f"calls: {name}"] = sorted(sizes[:])
sizes.clear()
sampled(guider_of(cfg(rules=rules_of("LGSkippedLayers", {}, sigma_lo=900.0)), watched), levels=one)
result["calls: outside its window"] = sizes[:]

# --- a transformer: core's own skip-layer guidance, and what it does not let in ---------------------------------------------

torch.manual_seed(0)
settings = comfy.supported_models.SD3(
    {
        "in_channels": 16,
        "patch_size": 2,
        "depth": 4,
        "pos_embed_max_size": 16,
        "num_patches": 256,
        "adm_in_channels": 8,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 12, "out_features": 256}},
        "pos_embed_scaling_factor": None,
    }
)
settings.set_inference_dtype(torch.float32, None)
sd3 = comfy.model_base.SD3(settings, device="cpu")
with torch.no_grad():
    for parameter in [*sd3.diffusion_model.parameters(), *sd3.diffusion_model.buffers()]:
        parameter.copy_(torch.randn_like(parameter) * 0.1)
device = comfy.model_management.get_torch_device()
transformer = comfy.model_patcher.ModelPatcher(sd3.eval(), load_device=device, offload_device=device)
texts = [[[torch.randn(1, 3, 12), {"pooled_output": torch.randn(1, 8)}]] for _ in range(2)]
flow_latent = torch.zeros(2, 16, 8, 12)
flow_noise = torch.randn(2, 16, 8, 12)
flow = dict(start=flow_noise, x=flow_latent, levels=torch.tensor([1.0, 0.6, 0.2, 0.0]))
skipped = SkipLayerGuidanceDiT.execute(transformer, 2.0, 0.0, 1.0, "1, 2", "").result[0]
core = sampled(core_cfg(skipped, 3.0, *texts), **flow)
slg = rules_of("LGSkippedLayers", {"layers": "1-2"})
result["slg: guider is core's node"] = far(core, sampled(guider_of(cfg(3.0, slg), transformer, *texts), **flow))
result["slg: on a model is core's node"] = far(core, sampled(core_cfg(on_model(slg, transformer), 3.0, *texts), **flow))
middle = rules_of("LGSkippedLayers", {"layers": "middle"})
result["slg: middle of four"] = far(core, sampled(guider_of(cfg(3.0, middle), transformer, *texts), **flow))
result["slg differs: from cfg"] = far(core, sampled(core_cfg(transformer, 3.0, *texts), **flow))
other = rules_of("LGSkippedLayers", {"layers": "2"})
result["slg differs: other layers"] = far(core, sampled(guider_of(cfg(3.0, other), transformer, *texts), **flow))
swg = guider_of(rules_of("LGSlidingWindow", {}), transformer, *texts)
through_windows = sampled(swg, **flow)
result["swg differs: on a transformer"] = far(sampled(core_cfg(transformer, 1.0, *texts), **flow), through_windows)
result["finite"] = bool(torch.isfinite(through_windows).all()) and bool(torch.isfinite(both).all())
for name, node in (("pag", "LGPerturbedAttention"), ("seg", "LGSmoothedEnergy"), ("tpg", "LGTokenPerturbation")):
    rules = rules_of(node, {})
    result[f"refused: {name} on a transformer"] = refused(lambda r=rules: guider_of(r, transformer, *texts))
attention = rules_of("LGSkippedLayers", {"skip": "attention"})
result["refused: attention skip on a transformer"] = refused(lambda: guider_of(attention, transformer, *texts))
missing = rules_of("LGSkippedLayers", {"layers": "2-9"})
result["refused: a transformer's layers"] = refused(lambda: guider_of(missing, transformer, *texts))
result["refused: a U-Net's layers"] = refused(lambda: guider_of(missing))
result["refused: a U-Net's layers on a model"] = refused(lambda: on_model(missing))
result["refused: wrapped layers"] = refused(lambda: guider_of(missing, wrapped))
sd3.diffusion_model.double_blocks = [None] * 10  # a network that says it has blocks, and does not ask for their patches
deaf = guider_of(rules_of("LGSkippedLayers", {"layers": "9"}), transformer, *texts)
result["refused: patches that are not asked for"] = refused(lambda: sampled(deaf, **flow))
del sd3.diffusion_model.double_blocks
area = [[entry[0], {**entry[1], "area": (8, 6, 0, 0), "strength": 1.0}] for entry in positive]
windows = rules_of("LGSlidingWindow", {})
result["refused: windows and an area"] = refused(lambda: guider_of(windows, cond=area))
result["refused: windows and an area on a model"] = refused(lambda: sampled(core_cfg(on_model(windows), 2.0, area)))
