"""Guiders, patches and small classifiers for scripts that run inside a ComfyUI: one place for how a test samples."""

# ruff: noqa: ANN001, ANN003, ANN201, ANN202, ANN204
import importlib
import logging
import warnings
from contextlib import contextmanager

import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic
from inside import call, part

LABELS = ("cat", "dog", "bird")


def classifier_for(latents, **changes):
    """A random classifier of ``latents`` (the library's Latents), as its loader gives it."""
    classifiers = part("latent_guidance.models.classifier")
    made = dict(
        labels=LABELS, latent_space=latents.name, latent_channels=latents.channels, scaling_factor=latents.scaling_factor or 1.0,
        shift_factor=latents.shift_factor, log_snr_range=(-12.0, 12.0), channels=(32, 32),
    ) | changes  # fmt: skip
    with torch.inference_mode(False):
        torch.manual_seed(0)
        network = classifiers.new_classifier(classifiers.ClassifierConfig(**made))
    return part("nodes.runtime.comfy.networks").ClassifierHandle(classifiers.Classifier(network))


def rule(classifier, rules=(), label="cat", scale=0.3, scaling="relative", **more):
    """A chain with classifier guidance at its end; by default it adds 0.3 of x - denoised."""
    inputs = dict(combine="any", sigma_lo=0.0, sigma_hi=1000.0, every_k=1, clip=1000.0, form="score") | more
    return call(
        "LGClassifierGuidance", classifier=classifier, label=label, guidance_scale=scale, scaling=scaling, rules=rules, **inputs
    )[0]  # fmt: skip


def cfg(scale, rules=()):
    return call("LGCFG", guidance_scale=scale, rules=rules)[0]


def core_node(model, module, name, **inputs):
    """``model`` with a guidance node of core's on it, in comfy_extras.``module``."""
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    answer = cls.execute(model, **inputs) if hasattr(cls, "execute") else cls().patch(model, **inputs)
    return getattr(answer, "result", answer)[0]


def patch(model, rules):
    return call("LGApplyGuidance", model=model, rules=rules)[0]


class Stage:
    """One MODEL with its conditions, noise and noise levels, sampled in every way there is.

    Args:
        model: MODEL.
        positive, negative: CONDITIONING.
        latent: (B, C, h, w), unscaled.
        steps, scheduler: of the noise levels.
    """

    def __init__(self, model, positive, negative, latent, *, steps=2, scheduler="simple", sampler="euler"):
        self.model, self.positive, self.negative, self.latent = model, positive, negative, latent
        self.steps, self.scheduler, self.sampler = steps, scheduler, sampler
        self.noise = comfy.sample.prepare_noise(latent, 5)
        self.sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)

    def run(self, guider, **more):
        sampler = comfy.samplers.sampler_object(self.sampler)
        return guider.sample(self.noise, self.latent, sampler, self.sigmas, disable_pbar=True, seed=5, **more)

    def guider(self, rules=(), model=None, negative=True):
        negative = self.negative if negative else None
        model = self.model if model is None else model
        return call("LGGuider", model=model, positive=self.positive, negative=negative, rules=rules)[0]

    def ours(self, rules=(), model=None, negative=True, **more):
        """By the pack's guider."""
        return self.run(self.guider(rules, model, negative), **more)

    def core(self, model, scale, **more):
        """By core's CFGGuider."""
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(scale)
        return self.run(guider, **more)

    def basic(self, model, **more):
        """By core's BasicGuider."""
        guider = Guider_Basic(model)
        guider.set_conds(self.positive)
        return self.run(guider, **more)

    def ksampler(self, model, scale, **more):
        """By what stands behind core's KSampler."""
        return comfy.sample.sample(
            model, self.noise, self.steps, scale, self.sampler, self.scheduler, self.positive, self.negative, self.latent,
            seed=5, disable_pbar=True, **more,
        )  # fmt: skip

    def estimate(self, rules, x, sigma):
        """The guided estimate of x (B, ...), scaled, at one noise level."""
        found = []

        def take(model, start, sigmas, extra_args=None, **_):
            found.append(model(x, torch.full((len(x),), sigma), **extra_args))
            return start

        guider = self.guider(rules, negative=False)
        guider.sample(self.noise, self.latent, comfy.samplers.KSAMPLER(take), self.sigmas, disable_pbar=True, seed=5)
        return found[0]


@contextmanager
def noted():
    """A list of every warning, by Python or by the pack's logger, in the ``with`` block."""
    found = []

    class Noting(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    log, handler = logging.getLogger("latent_guidance"), Noting(logging.WARNING)
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [str(warning.message) for warning in caught]
    finally:
        log.removeHandler(handler)
