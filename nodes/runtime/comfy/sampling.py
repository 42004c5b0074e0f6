"""The library's samplers as ComfyUI SAMPLERs, and noise with one seed per picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ....latent_guidance.errors import UserError
from ....latent_guidance.guidance import check_by_uncond
from ....latent_guidance.guidance.record import Record
from ....latent_guidance.guidance.run import no_negative
from ....latent_guidance.guidance.steps import check_not_twice, check_step_rules, sampler_options
from ....latent_guidance.noise import SeededNoise
from ....latent_guidance.process import Process
from ....latent_guidance.samplers import CFG_PP, GO_BY_UNCOND
from .checks import check_latents
from .marks import IN_STEPS, process_of, rules_on
from .memory import needed


class ComfyDenoiser:
    """What ComfyUI hands to a sampler, as a library Denoiser; conditions are its own business."""

    def __init__(self, model: Any, process: Process, extra_args: Mapping[str, Any]) -> None:
        self.process = process
        self._model, self._extra = model, extra_args

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self._model(x, sigma, **self._extra)

    def with_uncond(self, x: Tensor, sigma: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        """The guided estimate and the negative's, which a guider tells to hooks that come after its combination.

        Raises:
            UserError: a guider that tells none.
        """
        told: list[Tensor] = []

        def listen(args: dict[str, Any]) -> Tensor:
            told[:] = [] if args["uncond"] is None else [args["uncond_denoised"]]
            return args["denoised"]

        options = comfy.model_patcher.set_model_options_post_cfg_function(
            dict(self._extra.get("model_options", {})), listen, disable_cfg1_optimization=True
        )
        denoised = self._model(x, sigma, **{**self._extra, "model_options": options})
        if not told:
            raise _no_negative()
        return denoised, told[0]


def _no_negative() -> UserError:
    return no_negative(
        "a CFG++ sampler, which goes by the negative's estimate, under a guider that evaluates none",
        mend="connect a negative, for instance Null Conditioning, to Guider, or use CFGGuider in the place of BasicGuider",
    )


def make_sampler(
    function: Callable[..., Tensor], options: Mapping[str, Any], step_rules: Sequence[Any] = ()
) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs a library ``sample_*`` function.

    Noise inside the steps is drawn for each picture from its own seed, the run's seed + its place in the batch, and continues
    the stream that :func:`seeded_noise` starts.

    Raises:
        UserError: rules that do not act inside a step; at run time, a classifier that also guides through the guider.
    """
    rules = tuple(step_rules)
    check_step_rules(rules)

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **_: Any,
    ) -> Tensor:
        if len(sigmas) < 2:
            return x
        extra, guider = extra_args or {}, model.inner_model
        process = process_of(guider.inner_model.model_sampling)
        _prepare(guider, rules, tuple(x.shape))
        if function in GO_BY_UNCOND:
            _check_by_uncond(guider, own_scale=function not in CFG_PP)
        kept = getattr(guider, IN_STEPS, None)  # of a run that keeps a report
        record = None if kept is None or not rules else Record("sampler")
        if record is not None:
            kept.append(record)
        bar = _bar(len(sigmas) - 1, disable)

        def report(i: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if callback is not None:
                callback({"i": i, "sigma": sigma, "sigma_hat": sigma, "x": x, "denoised": denoised})
            bar.update(i + 1 - bar.n)  # nothing for a step that is taken again

        with bar:
            return function(
                ComfyDenoiser(model, process, extra),
                x,
                sigmas,
                callback=report,
                noise_sampler=step_noise(int(extra.get("seed") or 0), x),
                **options,
                **sampler_options(rules, process, sigmas, record),
            )

    return comfy.samplers.KSAMPLER(sample)


def _bar(total: int, disable: bool | None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, disable=disable)


def _prepare(guider: Any, rules: Sequence[Any], shape: tuple[int, ...]) -> None:
    """Check the step rules against what the guider does with latents of ``shape`` (B, ...), and load their networks beside its model."""
    check_latents(guider.model_patcher, rules)
    for rule in rules:
        rule.check_shape(shape)
    check_not_twice(rules_on(guider.model_options), rules)
    patchers = [
        handle.patcher for rule in rules for handle in rule.networks() if getattr(handle, "patcher", None) is not None
    ]
    if patchers:
        need = needed(guider, shape, (*rules_on(guider.model_options), *rules))
        comfy.model_management.load_models_gpu([guider.model_patcher, *guider.loaded_models, *patchers], **need)


def _check_by_uncond(guider: Any, *, own_scale: bool) -> None:
    """Refuse a guider that cannot serve a CFG++ sampler, before the first step; ``own_scale``: one that guides with a scale of its own."""
    if not getattr(guider, "conds", {}).get("negative"):
        raise _no_negative()
    if not own_scale:
        check_by_uncond(rules_on(guider.model_options))
    elif (scale := float(getattr(guider, "cfg", 1.0))) != 1:
        raise UserError(
            f"Rectified-CFG++ under a guider whose own scale is {scale:g}, which its correction would multiply",
            expected="a guider that leaves the prompt's estimate as it is",
            mend="set the cfg of CFGGuider to 1, or take CFG out of the chain of Guider; the strength is the sampler's scale",
        )


def step_noise(seed: int, x: Tensor) -> SeededNoise:
    """The noise of a sampler's steps: per picture, and past what was drawn for the initial noise."""
    noise = SeededNoise(
        [(seed + item) % 2**64 for item in range(len(x))], x.shape, dtype=torch.float32, device=x.device
    )
    noise.initial(x.shape)
    return noise


class Noise:
    """A NOISE whose item i depends on ``seeds[i]`` alone. ``seed`` is that of the first, as ComfyUI's samplers ask for it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self.seed = self.seeds[0]

    def generate_noise(self, input_latent: Mapping[str, Any]) -> Tensor:
        """Unit Gaussian noise of the latent's shape, on the CPU.

        Raises:
            UserError: another number of pictures than seeds.
        """
        samples = input_latent["samples"]
        if len(samples) != len(self.seeds):
            raise UserError(
                f"noise for {len(self.seeds)} pictures and a latent of {len(samples)}",
                expected="one seed for every picture",
                mend=f"set batch_size of Seeded Noise to {len(samples)}",
            )
        return SeededNoise(self.seeds).initial(samples.shape)
