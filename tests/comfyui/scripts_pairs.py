"""Runs inside ComfyUI (see inside.py): every rule alone, with each of core's guidance nodes, and a covering sample of pairs.

Everything is made from the list of rules: a new one joins by itself.
"""

# ruff: noqa: ANN001, ANN002, ANN003, ANN201
import itertools

import comfy.sample
import comfy.samplers
import comfy_extras.nodes_post_processing  # noqa: F401, before nodes_latent, each of which imports the other
import stage
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic
from inside import call, far, part, refused, result

STEPS = 4
library = part("latent_guidance.guidance")
knobs = part("latent_guidance.guidance.knobs")
model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
weak, _, _ = call("LGLoadCheckpoint", checkpoint="tiny")
for parameter in weak.model.diffusion_model.parameters():  # another network, as autoguidance wants it
    parameter.mul_(0.7)
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(other,) = call("LGTextEncode", clip=clip, text="a flag, blue and white, in the wind")
(negative,) = call("LGNullConditioning", clip=clip)
SOCKETS = {
    "LG_CLASSIFIER": call("LGLoadClassifier", classifier="tiny")[0],
    "LG_NOISY_CLIP": call("LGLoadNoisyCLIP", noisy_clip="tiny")[0],
    "CONDITIONING": other,
    "MODEL": weak,
    "LG_LOSS": call("LGLossReference", reference={"samples": torch.linspace(-3, 3, 384).reshape(1, 4, 8, 12)})[0],
}


class Small:
    """Somebody's own log-probability: of latents near zero."""

    def log_prob(self, x, sigma):
        return -x.square().flatten(1).sum(1) / (1 + sigma**2)


STRONGER = {  # where the defaults do nothing on a network of random weights
    "LGAdaptiveGuidance": {"threshold": 0.5},
    "LGClassifierGuidance": {"guidance_scale": 60.0, "scaling": "raw"},
    "LGNoisyCLIPGuidance": {"guidance_scale": 60.0},
    "LGLogProbGuidance": {"loss": Small()},
    "LGDynamicThresholding": {"percentile": 0.9},
}
latent = torch.zeros(1, 4, 8, 12)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)
EULER = comfy.samplers.sampler_object("euler")
cfg = library.CFG(guidance_scale=4.0)


def made(rule_class):
    """The rule at its defaults (or stronger), with what its sockets take; None where it needs what is not at hand here."""
    given = {}
    for name, knob in knobs.knobs(rule_class).items():
        if isinstance(knob, knobs.Socket) and not knob.optional:
            if knob.type not in SOCKETS:
                return None
            given[name] = SOCKETS[knob.type]
        elif (
            isinstance(knob, knobs.Text)
            and not knobs.default(rule_class, name)
            and getattr(knob, "neutral", None) is None
        ):
            given[name] = "Flags"
    return rule_class(**given | STRONGER.get(rule_class.node.id, {}))


def sampled(guider, sampler=EULER):
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=5)


def ours(rules, guided=model):
    (inside, at_step) = ([r for r in rules if (r.stage is library.Stage.STEP) is step] for step in (False, True))
    if at_step:
        (sampler,) = call("LGSamplerDDPM", variance="beta_tilde", rules=tuple(at_step))
    else:
        sampler = EULER
    guider = call("LGGuider", model=guided, positive=positive, negative=negative, rules=tuple(inside))[0]
    return sampled(guider, sampler)


def core_guider(guided, scale=4.0):
    guider = comfy.samplers.CFGGuider(guided)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


def basic(guided):
    guider = Guider_Basic(guided)
    guider.set_conds(positive)
    return sampled(guider)


def ksampler(guided, scale=4.0):
    return comfy.sample.sample(
        guided, noise, STEPS, scale, "euler", "karras", positive, negative, latent, seed=5, disable_pbar=True
    )


def patch(guided, *rules):
    return call("LGApplyGuidance", model=guided, rules=rules)[0]


def chain(*rules):
    """The rules with CFG before them, if none combines the branches already."""
    combines = any(rule.stage is library.Stage.COMBINE for rule in rules)
    return rules if combines else (cfg, *rules)


def core_node(module, name, **inputs):
    return stage.core_node(model, module, name, **inputs)


CORE = {
    "RescaleCFG": lambda: core_node("nodes_model_advanced", "RescaleCFG", multiplier=0.7),
    "PerturbedAttentionGuidance": lambda: core_node("nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
    "SelfAttentionGuidance": lambda: core_node("nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "FreeU_V2": lambda: core_node("nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "CFGZeroStar": lambda: core_node("nodes_cfg", "CFGZeroStar"),
    "CFGNorm": lambda: core_node("nodes_cfg", "CFGNorm", strength=1.0),
    "TCFG": lambda: core_node("nodes_tcfg", "TCFG"),
    "APG": lambda: core_node("nodes_apg", "APG", eta=0.5, norm_threshold=1.0, momentum=0.0),
    "Mahiro": lambda: core_node("nodes_mahiro", "Mahiro"),
    "RenormCFG": lambda: core_node("nodes_lumina2", "RenormCFG", cfg_trunc=100.0, renorm_cfg=1.0),
    "EpsilonScaling": lambda: core_node("nodes_eps", "EpsilonScaling", scaling_factor=1.05),
    "FreSca": lambda: core_node("nodes_fresca", "FreSca", scale_low=1.0, scale_high=1.5, freq_cutoff=2),
    "LatentApplyOperationCFG": lambda: core_node(
        "nodes_latent", "LatentApplyOperationCFG", operation=lambda latent: 0.8 * latent
    ),
    "VideoLinearCFGGuidance": lambda: core_node("nodes_video_model", "VideoLinearCFGGuidance", min_cfg=2.0),
    "VideoTriangleCFGGuidance": lambda: core_node("nodes_video_model", "VideoTriangleCFGGuidance", min_cfg=2.0),
    "NAGuidance": lambda: core_node("nodes_nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    "TemporalScoreRescaling": lambda: core_node("nodes_eps", "TemporalScoreRescaling", tsr_k=0.9, tsr_sigma=1.0),
}

plain, only_cfg = ours(()), ours((cfg,))
(ddpm,) = call("LGSamplerDDPM", variance="beta_tilde")
only_cfg_by_ddpm = sampled(call("LGGuider", model=model, positive=positive, negative=negative, rules=(cfg,))[0], ddpm)

# --- every rule alone -------------------------------------------------------------------------------------------------

rules = {rule_class.node.id: made(rule_class) for rule_class in library.RULES}
result["not made"] = [name for name, rule in rules.items() if rule is None]
rules = {name: rule for name, rule in rules.items() if rule is not None}
alone = {name: ours(chain(rule)) for name, rule in rules.items()}
result["alone"] = {
    name: {
        "finite": bool(torch.isfinite(out).all()),
        "from unguided": far(plain, out),
        "from cfg": far(only_cfg_by_ddpm if rules[name].stage is library.Stage.STEP else only_cfg, out),
    }
    for name, out in alone.items()
}

# --- on the model, under core's guiders -------------------------------------------------------------------------------

result["on the model"], result["only in a guider"] = {}, {}
for name, rule in rules.items():
    error = refused(lambda rule=rule: patch(model, rule))
    if error:
        result["only in a guider"][name] = [error, rule.node.name]
        continue
    by_guider = ours((rule,)) if "uncond" not in rule.may_ask() and rule.stage is not library.Stage.COMBINE else None
    result["on the model"][name] = {
        "CFGGuider": far(alone[name], sampled(core_guider(patch(model, rule)))),
        "KSampler": far(alone[name], ksampler(patch(model, rule))),
        "BasicGuider": None if by_guider is None else far(by_guider, basic(patch(model, rule))),
    }

# --- with core's own nodes --------------------------------------------------------------------------------------------

result["core"], result["core beside"], result["core refused"], nodes = {}, {}, {}, {}
for name, make in CORE.items():
    try:
        nodes[name] = make()
    except (AttributeError, ImportError, ModuleNotFoundError):
        result["core"][name] = "not in this version"
        continue
    result["core"][name] = refused(lambda guided=nodes[name]: sampled(core_guider(guided)))
    if result["core"][name]:
        del nodes[name]

by_node = {
    node: (
        ours((cfg,), guided),
        sampled(call("LGGuider", model=guided, positive=positive, negative=negative, rules=(cfg,))[0], ddpm),
    )
    for node, guided in nodes.items()
}
for (node, guided), (name, rule) in itertools.product(nodes.items(), rules.items()):
    found = []
    error = refused(lambda rule=rule, guided=guided, found=found: found.append(ours(chain(rule), guided)))
    if error:
        result["core refused"][f"{node} + {name}"] = error
        continue
    (out,) = found
    result["core beside"][f"{node} + {name}"] = {
        "finite": bool(torch.isfinite(out).all()),
        "from unguided": far(plain, out),
        "from the rule": far(alone[name], out),
        "from the node": far(by_node[node][rule.stage is library.Stage.STEP], out),
    }

# --- core's nodes under a rule on the model ------------------------------------------------------------------------------

result["core under a patch"], result["core under a patch refused"] = {}, {}
for node, guided in nodes.items():
    by_itself = sampled(core_guider(guided))
    for name in ("LGClassifierGuidance", "LGMPGD", "LGRescaleGuidance", "LGPerturbedAttention"):
        found = []
        error = refused(
            lambda name=name, guided=guided, found=found: found.append(sampled(core_guider(patch(guided, rules[name]))))
        )
        if error:
            result["core under a patch refused"][f"{node} + {name}"] = error
            continue
        result["core under a patch"][f"{node} + {name}"] = {
            "finite": bool(torch.isfinite(found[0]).all()),
            "from the node": far(by_itself, found[0]),
            "from the rule": far(alone[name], found[0]),
        }

# HyperTile draws its tiles, and cuts nothing smaller than 32 pixels: a larger latent, and the same draws for all
size, noise_of, latent_of = (16, 24), noise, latent
latent = torch.zeros(1, 4, *size)
noise = comfy.sample.prepare_noise(latent, 5)
tiled = core_node("nodes_hypertile", "HyperTile", tile_size=32, swap_size=2, max_depth=1, scale_depth=False)


def drawn(action):
    torch.manual_seed(3)
    return action()


classifier = rules["LGClassifierGuidance"]
both = drawn(lambda: ours((cfg, classifier), tiled))
result["HyperTile"] = {
    "from the node": far(drawn(lambda: ours((cfg,), tiled)), both),
    "from the rule": far(drawn(lambda: ours((cfg, classifier))), both),
    "patch": far(drawn(lambda: sampled(core_guider(patch(tiled, classifier)))), both),
}
noise, latent = noise_of, latent_of

# --- pairs ------------------------------------------------------------------------------------------------------------


result["pairs"], result["refused"] = {}, {}
names = list(rules)
for distance in (1, 4, 9):  # each rule with six others, of near and far stages
    for i, first in enumerate(names):
        second = names[(i + distance) % len(names)]
        found = []
        error = refused(lambda pair=(rules[first], rules[second]), found=found: found.append(ours(chain(*pair))))
        if error:
            result["refused"][f"{first} + {second}"] = [error, rules[first].node.name, rules[second].node.name]
            continue
        result["pairs"][f"{first} + {second}"] = {
            "finite": bool(torch.isfinite(found[0]).all()),
            "from unguided": far(plain, found[0]),
            "from the first": far(alone[first], found[0]),
            "from the second": far(alone[second], found[0]),
        }
