"""MODELs of checkpoint folders: ComfyUI's own network class where the architecture maps, else the library's, wrapped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import torch
from comfy import patcher_extension
from torch import Tensor

from ....latent_guidance.attention import AttentionPatch
from ....latent_guidance.errors import UserError
from ....latent_guidance.models.files import load_weights
from ....latent_guidance.models.unet import ConditionedUNet
from ....latent_guidance.schedules import DiscreteSchedule, FlowSchedule, schedule_from_config
from .memory import ALL
from .native import native_unet_config, native_weights

log = logging.getLogger("latent_guidance")

_BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
_MODEL_TYPES = {"epsilon": "EPS", "v_prediction": "V_PREDICTION", "sample": "EPS", "flow": "FLOW"}


@dataclass(frozen=True)
class LatentSpace:
    """What a MODEL must know of the VAE beside it."""

    channels: int
    scaling_factor: float
    preview: Callable[[], tuple[list[list[float]], list[float]] | None]
    name: str = "checkpoint"


class WholeModelPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher for networks of plain torch layers, which must be loaded whole: they cannot cast layer by layer."""

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        return super().partially_load(device_to, ALL, force_patch_weights=force_patch_weights)

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        return 0  # nothing freed: ComfyUI then unloads it whole


def latent_format(space: LatentSpace) -> comfy.latent_formats.LatentFormat:
    """A LatentFormat that scales as the checkpoint's VAE says; its preview colours are worked out when first wanted."""

    class CheckpointLatents(comfy.latent_formats.LatentFormat):
        scale_factor = space.scaling_factor
        latent_channels = space.channels
        latent_space = space.name
        _colours: Any = ()

        def _preview(self) -> Any:
            if self._colours == ():
                type(self)._colours = space.preview()
            return self._colours

        @property
        def latent_rgb_factors(self) -> list[list[float]] | None:
            return None if self._preview() is None else self._preview()[0]

        @property
        def latent_rgb_factors_bias(self) -> list[float] | None:
            return None if self._preview() is None else self._preview()[1]

    return CheckpointLatents()


def _model_config(space: LatentSpace, scheduler: Mapping[str, Any], unet_config: dict[str, Any], count: int) -> Any:
    """ComfyUI's description of a model, from which its own nodes rebuild model_sampling."""
    if "FlowMatch" not in str(scheduler.get("_class_name")):  # diffusers' own defaults, where a config leaves them out
        scheduler = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, **scheduler}
    settings: dict[str, Any] = {}
    if scheduler.get("beta_schedule") in _BETA_SCHEDULES:
        settings["beta_schedule"] = _BETA_SCHEDULES[scheduler["beta_schedule"]]
    for theirs, ours in (
        ("linear_start", "beta_start"),
        ("linear_end", "beta_end"),
        ("timesteps", "num_train_timesteps"),
        ("shift", "shift"),
        ("zsnr", "rescale_betas_zero_snr"),
    ):
        if scheduler.get(ours) is not None:
            settings[theirs] = scheduler[ours]

    class Checkpoint(comfy.supported_models_base.BASE):
        unet_extra_config: ClassVar[dict[str, Any]] = {}
        sampling_settings = settings
        memory_usage_factor = 1.0

        def inpaint_model(self) -> bool:
            return False

    config = Checkpoint(unet_config)
    config.latent_format = latent_format(space)
    device = comfy.model_management.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(device=device, model_params=count, supported_dtypes=supported)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))
    return config


def _model_sampling(config: Any, scheduler: Mapping[str, Any]) -> Any:
    """model_sampling with the library's own table of noise levels, so that both hosts sample at the same ones."""
    schedule, parameterization = schedule_from_config(scheduler)
    sampling = comfy.model_sampling
    kinds = {
        "epsilon": sampling.EPS,
        "v_prediction": sampling.V_PREDICTION,
        "sample": sampling.X0,
        "flow": sampling.CONST,
    }
    base = sampling.ModelSamplingDiscreteFlow if isinstance(schedule, FlowSchedule) else sampling.ModelSamplingDiscrete

    class ModelSampling(base, kinds[parameterization.name]):  # type: ignore[misc, valid-type]
        pass

    made = ModelSampling(config)
    if isinstance(schedule, DiscreteSchedule):
        made.set_sigmas(schedule.sigmas)
    else:
        made.set_parameters(shift=schedule.shift, timesteps=schedule.num_timesteps, multiplier=schedule.multiplier)
    return made


def _patcher(model: Any, *, whole: bool) -> comfy.model_patcher.ModelPatcher:
    kind = WholeModelPatcher if whole else comfy.model_patcher.ModelPatcher
    management = comfy.model_management
    return kind(model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


def native_model(
    unet: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    scheduler: Mapping[str, Any],
    space: LatentSpace,
    *,
    path: Path,
) -> comfy.model_patcher.ModelPatcher | str:
    """A MODEL in ComfyUI's UNetModel, or a sentence saying what keeps this network out of it.

    Args:
        unet: diffusers' UNet2DConditionModel config.
        weights: its state dict.
        scheduler: diffusers' scheduler config.
        space: the latents it works on.
        path: where the weights come from; named in errors.

    Raises:
        UserError: weights that are not those of the config.
    """
    config = native_unet_config(unet)
    if isinstance(config, str):
        return config
    translated = native_weights(config, weights)
    if isinstance(translated, str):
        return translated
    settings = _model_config(space, scheduler, config, sum(w.numel() for w in weights.values()))
    device = comfy.model_management.unet_offload_device()
    model_type = comfy.model_base.ModelType[_MODEL_TYPES[schedule_from_config(scheduler)[1].name]]
    model = comfy.model_base.BaseModel(settings, model_type=model_type, device=device)
    load_weights(model.diffusion_model, translated, path=path, what="UNet")
    model.model_sampling = _model_sampling(settings, scheduler)
    model.to(device).eval()
    return _patcher(model, whole=False)


class WrappedNetwork(torch.nn.Module):
    """The library's UNet with the signature of ComfyUI's diffusion models: context is the tokens, y the pooled text."""

    def __init__(self, unet: torch.nn.Module, *, channels: int) -> None:
        super().__init__()
        self.unet, self.channels = unet, channels
        self._network = ConditionedUNet(unet)  # type: ignore[arg-type]
        self.dtype = next(unet.parameters()).dtype
        self._said = False

    def check_patch(self, patch: AttentionPatch) -> None:
        """Refuse a change of attention in layers that the network has not got."""
        self._network.check_patch(patch)

    def patched(self, patches: Sequence[AttentionPatch | None]) -> AbstractContextManager[None]:
        """In this context sample i of a call goes through with ``patches[i % len(patches)]``."""
        return self._network.patched(patches)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        control: Any = None,
        **_: Any,
    ) -> Tensor:
        """One call, through the wrappers that nodes such as EasyCache put around a network."""
        options = transformer_options or {}
        wrappers = patcher_extension.get_all_wrappers(patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        called = patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return called.execute(x, timesteps, context, y, control, options)

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None,
        y: Tensor | None,
        control: Any,
        options: Mapping[str, Any],
        **_: Any,
    ) -> Tensor:
        if not self._said and (control or any(options.get(kind) for kind in ("patches", "patches_replace"))):
            self._said = True
            log.warning(
                "A node on this MODEL reaches into ComfyUI's own network (PAG, SAG, FreeU, HyperTile, ControlNet ...), and this "
                "checkpoint's is of an architecture that ComfyUI has none for: the node has no effect on it. The pack's own attention "
                "rules have."
            )
        output = self._network(x, timesteps, {"tokens": context, "vector": y})
        return output[:, : self.channels]  # what a learned-range network says of the variance has no place in ComfyUI


class WrappedModel(comfy.model_base.BaseModel):
    """A BaseModel around the library's UNet."""

    def encode_adm(self, **kwargs: Any) -> Tensor | None:
        return kwargs.get("pooled_output") if "vector" in self.diffusion_model._network.needs else None


def wrapped_model(
    unet: torch.nn.Module, scheduler: Mapping[str, Any], space: LatentSpace
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL around the library's network, for architectures that ComfyUI's UNetModel does not have.

    It samples, guides and combines like any other; the pack's own rules change its attention, other nodes' patches that reach into
    ComfyUI's attention (PAG, HyperTile) do nothing, which is said in a warning.

    Raises:
        UserError: a network that needs a condition which a node graph cannot give.
    """
    network = WrappedNetwork(unet.float().eval(), channels=space.channels)
    if "label" in network._network.needs:
        raise UserError(
            "a UNet with a class table (num_class_embeds)",
            expected="a UNet conditioned on text tokens or on the pooled text",
            mend="use it from Python (latent_guidance.models), or train one with cross-attention",
        )
    count = sum(parameter.numel() for parameter in unet.parameters())
    config = {"disable_unet_model_creation": True, "in_channels": space.channels}
    settings = _model_config(space, scheduler, config, count)
    settings.set_inference_dtype(torch.float32, None)
    model_type = comfy.model_base.ModelType[_MODEL_TYPES[schedule_from_config(scheduler)[1].name]]
    model = WrappedModel(settings, model_type=model_type, device=comfy.model_management.unet_offload_device())
    model.diffusion_model = network
    model.model_sampling = _model_sampling(settings, scheduler)
    return _patcher(model.eval(), whole=True)
