"""Runs inside ComfyUI (see inside.py): rules on a MODEL under guiders that combine their estimates in a way of their own."""

# ruff: noqa: ANN001, ANN003, ANN201, ANN202
import comfy.samplers
import stage
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from inside import call, far, part, refused, result

model, clip, _ = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(middle,) = call("LGTextEncode", clip=clip, text="a blue flag")
(negative,) = call("LGNullConditioning", clip=clip)
classifier = stage.classifier_for(part("nodes.runtime.comfy.checks").latents_of(model.model.latent_format))
here = stage.Stage(model, positive, negative, torch.zeros(1, 4, 8, 12), steps=4)
raw = stage.rule(classifier, scaling="raw", scale=60.0)
relative = stage.rule(classifier, scale=3.0)
x, SIGMA = here.noise * 3.0, 2.0


def estimate(guider):
    """What a guider makes of x at one noise level."""
    found = []

    def take(step_model, start, sigmas, extra_args=None, **_):
        found.append(step_model(x, torch.full((len(x),), SIGMA), **extra_args))
        return start

    guider.sample(here.noise, here.latent, comfy.samplers.KSAMPLER(take), here.sigmas, disable_pbar=True, seed=5)
    return found[0]


def dual(guided, nested=False):
    guider = Guider_DualCFG(guided)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(4.0, 1.5, nested=nested)
    return guider


def perp_neg(guided):
    guider = Guider_PerpNeg(guided)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(4.0, 1.2)
    return guider


def with_cfg(guided, scale=4.0):
    guider = comfy.samplers.CFGGuider(guided)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


def two_conditions(rules=()):
    inputs = dict(condition=middle, first_scale=1.5, second_scale=4.0, form="nested")
    return call("LGTwoConditions", rules=rules, **inputs)[0]


def perp_neg_rule(rules=()):
    return call("LGPerpNeg", negative=middle, guidance_scale=4.0, negative_scale=1.2, rules=rules)[0]


# --- gradients are added to what the guider shows -------------------------------------------------------------------

patched = stage.patch(model, raw)
added = estimate(with_cfg(patched)) - estimate(with_cfg(model))
result["added"] = far(estimate(with_cfg(model)), estimate(with_cfg(patched)))
for name, guider, times in (
    ("dual", dual, 1.0),
    ("dual nested", lambda guided: dual(guided, nested=True), 1.5),
    ("perp-neg", perp_neg, 1.0),
):
    result[f"{name}: adds"] = far(added * times, estimate(guider(patched)) - estimate(guider(model)))
result["dual nested: is not once"] = far(added, estimate(dual(patched, True)) - estimate(dual(model, True)))
result["dual: the guider's rule"] = far(here.ours(stage.rule(classifier, two_conditions(), scaling="raw", scale=60.0)),
                                        here.run(dual(patched)))  # fmt: skip
result["perp-neg: the guider's rule"] = far(
    here.ours(stage.rule(classifier, perp_neg_rule(), scaling="raw", scale=60.0)), here.run(perp_neg(patched))
)
by_shown = stage.patch(model, relative)  # its strength goes by the estimate that it is shown
result["relative: dual"] = far(here.ours(stage.rule(classifier, two_conditions(), scale=3.0)), here.run(dual(by_shown)))
result["relative: perp-neg"] = far(
    here.ours(stage.rule(classifier, perp_neg_rule(), scale=3.0)), here.run(perp_neg(by_shown))
)

# --- rules that go by prompt and negative are refused under a third condition -------------------------------------------

(rescale,) = call("LGRescaleGuidance", phi=0.7)
(interval,) = call("LGLimitedInterval", sigma_lo=0.0, sigma_hi=5.0)
result["refused"] = {
    f"{kind} under {name}": refused(lambda guider=guider, rules=rules: estimate(guider(stage.patch(model, rules))))
    for kind, rules in (("cfg", stage.cfg(4.0)), ("rescale", rescale), ("interval", interval))
    for name, guider in (("dual", dual), ("perp-neg", perp_neg))
}
result["our guider's conditions are no third"] = refused(
    lambda: here.ours(two_conditions(), stage.patch(model, rescale))
)

# --- a guider of two models ----------------------------------------------------------------------------------------------

try:
    from comfy_extras.nodes_custom_sampler import Guider_DualModel
except ImportError:
    result["two models"] = None
else:

    def dual_model(guided, scale):
        guider = Guider_DualModel(guided, model)
        guider.set_conds(positive, negative)
        guider.set_cfg(scale)
        return guider

    both = stage.rule(classifier, stage.cfg(3.0))
    result["two models"] = {
        "gradient": far(here.core(stage.patch(model, raw), 4.0), here.run(dual_model(patched, 4.0))),
        "cfg and gradient": far(here.ours(both), here.run(dual_model(stage.patch(model, both), 4.0))),
        "at cfg 1": refused(lambda: estimate(dual_model(patched, 1.0))),
    }

# --- a guider that asks nobody ---------------------------------------------------------------------------------------------


class Deaf(comfy.samplers.CFGGuider):
    """Somebody's guider, which goes by the prompt's estimate and by no node's hook."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        conds = [self.conds["positive"]]
        return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)[0]


def deaf(guided):
    guider = Deaf(guided)
    guider.set_conds(positive, negative)
    return guider


with stage.noted() as warnings:
    result["deaf: unguided"] = far(here.run(deaf(model)), here.run(deaf(patched)))
result["deaf"] = warnings
with stage.noted() as warnings:
    here.run(with_cfg(patched))
    here.sigmas = here.sigmas[:1]
    here.run(deaf(patched))  # no step, nothing to ask for
result["not deaf"] = warnings

# --- another pack's guider, with a condition of its own --------------------------------------------------------------------------


class Styled(comfy.samplers.CFGGuider):
    """Somebody's guider: CFG, and then half of the way to the estimate of a third prompt."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        guided = comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds["negative"],
            self.conds["positive"],
            self.cfg,
            model_options=model_options,
        )
        [style] = comfy.samplers.calc_cond_batch(self.inner_model, [self.conds["style"]], x, timestep, model_options)
        return guided + 0.5 * (style - guided)


def styled(guided):
    guider = Styled(guided)
    guider.inner_set_conds({"positive": positive, "negative": negative, "style": middle})
    guider.set_cfg(4.0)
    return guider


here.sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
with stage.noted() as warnings:
    result["styled: adds"] = far(0.5 * added, estimate(styled(patched)) - estimate(styled(model)))
result["styled: gradient"] = warnings
with stage.noted() as warnings:
    shown = estimate(with_cfg(stage.patch(model, rescale))) - estimate(with_cfg(model))
    result["styled: rescale"] = far(
        0.5 * shown, estimate(styled(stage.patch(model, rescale))) - estimate(styled(model))
    )
result["styled"] = warnings

# --- a node that sets a guider's cfg ---------------------------------------------------------------------------------------

import comfy_extras.nodes_custom_sampler as core_nodes  # noqa: E402

here.sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
if hasattr(core_nodes, "CFGOverride"):
    (overridden,) = core_nodes.CFGOverride.execute(model, 2.0, 0.0, 1.0).result
    with stage.noted() as warnings:
        guider = here.guider(stage.cfg(4.0), overridden)
        found = [here.run(guider), here.run(guider)]
    result["overridden"] = {
        "warnings": warnings,
        "our scale": max(far(here.ours(stage.cfg(4.0)), one) for one in found),
        "a gradient on the model": far(
            here.core(stage.patch(model, raw), 2.0), here.core(stage.patch(overridden, raw), 4.0)
        ),
    }
else:
    result["overridden"] = None

# --- what another pack's node leaves behind when it fails -------------------------------------------------------------------

both = stage.rule(classifier, stage.cfg(4.0))
before = {"guider": here.ours(both), "patch": here.core(stage.patch(model, raw), 4.0)}


def failing(args):
    raise RuntimeError("another pack's node failed")


broken = model.clone()
broken.set_model_sampler_post_cfg_function(failing)
result["foreign: failed"] = [
    refused(lambda: here.ours(both, broken)),
    refused(lambda: here.core(stage.patch(broken, raw), 4.0)),
]


def passing(module, name):
    """The function that stands there, called through one of somebody's own, which nobody takes away again."""
    standing = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: standing(*args, **kwargs))


for name in ("sampling_function", "cfg_function", "calc_cond_batch"):
    passing(comfy.samplers, name)
passing(comfy.samplers.CFGGuider, "predict_noise")
passing(comfy.samplers.CFGGuider, "outer_sample")
torch.set_grad_enabled(False)
after = {"guider": here.ours(both), "patch": here.core(stage.patch(model, raw), 4.0)}
result["foreign: after it"] = {name: far(before[name], after[name]) for name in before}
