r"""Noisy-latent CLIP guidance: towards latents that a CLIP on noisy latents finds alike with a text.

    D += w * sigma**2 / alpha * grad_x [ s * <text, image(x, sigma)> ]

text and image(x, sigma) are unit vectors, s the scale of similarities that the CLIP learned, so that s * <text, image> is its logit
and w = 1 GLIDE's own scale 1. With a text to go away from, s * (<text, image> - v * <away, image>) grows; at v = 1 that is the log
of how much likelier the one text is than the other in CLIP's own choice between the two.

Reference: arXiv 2112.10741, section 2.4 and the authors' code (openai/glide-text2im, clip/model_creation.py, cond_fn).
Space: the score, as for classifiers; works with every sampler.
Deviations: latents in the place of pictures, and an image side that is told the log-SNR in the place of a timestep. Several prompts in one
conditioning count equally, by the mean of their similarities. The gradient goes through D = E[x0 | x] as eq. 14 of 2105.05233 has it,
where GLIDE shifts the mean of a step: the same but for the variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..process import Process
from .base import NodeText, Stage, Step
from .gates import EveryK, GradientClip, Mask, SigmaHi, SigmaLo
from .gradient import relative_scale, score_form
from .knobs import UNLIMITED, Choice, Number, Socket
from .noisy_network import NetworkConfig, NoisyNetworkRule, spread


class NoisyCLIP(Protocol):
    """A CLIP on noisy latents as the rule sees it; see :class:`.noisy_network.NoisyNetwork`."""

    @property
    def config(self) -> NetworkConfig: ...

    network: nn.Module | None

    @property
    def logit_scale(self) -> Tensor:
        """What similarities are multiplied by to be logits, ()."""
        ...

    def check_text(self, tokens: Tensor) -> None:
        """Raise UserError if encoded prompts (B, L, D) are not of the text encoder that it was trained with."""
        ...

    def text_features(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, E) of encoded prompts (B, L, D)."""
        ...

    def image_features(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """Unit vectors (B, E) of unit-variance x (B, C, H, W) at log-SNR (B,), differentiable in x."""
        ...


def similarity(image: Tensor, target: Tensor, away: Tensor | None = None, away_scale: float = 1.0) -> Tensor:
    """mean_i <target_i, image> - v * mean_j <away_j, image>, (B,).

    Args:
        image: (B, E) unit vectors.
        target: (N, E) unit vectors of the texts to go to.
        away: (M, E) unit vectors of the texts to go away from; None for none.
        away_scale: v.
    """
    towards = (image @ target.T).mean(dim=1)
    return towards if away is None else towards - away_scale * (image @ away.T).mean(dim=1)


def encodings(conditioning: Any, where: str) -> tuple[Tensor, ...]:
    """The encoded prompts (1, L, D) in a CONDITIONING, a list of [tokens, {...}]; or a tensor (N, L, D) of them.

    Raises:
        UserError: there is none, or it is something else.
    """
    if isinstance(conditioning, Tensor):
        return conditioning.split(1)
    entries = conditioning if isinstance(conditioning, list | tuple) else []
    tokens = [entry[0] for entry in entries if isinstance(entry, list | tuple) and entry]
    if not tokens or not all(isinstance(some, Tensor) and some.ndim == 3 and len(some) == 1 for some in tokens):
        raise UserError(
            f"{where} without an encoded prompt, or with encodings that are not of one prompt each",
            expected="the encoding of a text",
            mend="connect Text Encode or CLIP Text Encode",
        )
    return tuple(tokens)


@dataclass(frozen=True, kw_only=True)
class NoisyCLIPGuidance(NoisyNetworkRule):
    stage: ClassVar[Stage] = Stage.GRADIENT
    what: ClassVar[str] = "noisy-latent CLIP"
    loader: ClassVar[str] = "Load Noisy-Latent CLIP"
    node: ClassVar[NodeText] = NodeText(
        id="LGNoisyCLIPGuidance",
        name="Noisy-Latent CLIP Guidance",
        name_zh="带噪潜变量 CLIP 引导",
        description="Steers the picture towards a text by the gradient of a CLIP that reads noisy latents: no decoding, any sampler, "
        "also with a model that takes no prompt.",
        description_zh="用读取带噪潜变量的 CLIP 的梯度把画面引向一段文字：无需解码，适用于任何采样器，也适用于不接受提示词的模型。",
        search_aliases=("clip guidance", "glide", "noisy clip", "noised clip", "gradient guidance", "text"),
    )

    noisy_clip: Annotated[
        Any,
        Socket(
            type="LG_NOISY_CLIP",
            made_by="the node Load Noisy-Latent CLIP",
            label_zh="带噪 CLIP",
            help="The noisy-latent CLIP to follow; it must have been trained on this model's latents.",
            help_zh="要遵循的带噪潜变量 CLIP；它必须在本模型的潜空间上训练。",
        ),
    ]
    target: Annotated[
        Any,
        Socket(
            type="CONDITIONING",
            made_by="Text Encode or CLIP Text Encode",
            label_zh="目标文字",
            help="The text to go to, encoded by the text encoder that the CLIP was trained with; several prompts count equally.",
            help_zh="要接近的文字，须由该 CLIP 训练所用的文本编码器编码；多个提示词权重相同。",
        ),
    ]
    away: Annotated[
        Any,
        Socket(
            type="CONDITIONING",
            optional=True,
            label_zh="远离文字",
            help="A text to go away from; without one, only the target counts.",
            help_zh="要远离的文字；不连接则只看目标文字。",
        ),
    ] = None
    guidance_scale: Annotated[
        float,
        Number(
            min=-1000.0,
            max=1000.0,
            step=0.1,
            neutral=0.0,
            paper_range="1 to 4",
            label_zh="引导强度",
            help="Strength of the push; 0 is off, 1 is the CLIP's own logit, more is clearer and less varied up to a point, "
            "below 0 steers away.",
            help_zh="推动的强度：0 关闭，1 即 CLIP 自身的 logit，在一定范围内越大越明确、多样性越低，负值则远离目标。",
        ),
    ] = 5.0
    away_scale: Annotated[
        float,
        Number(
            min=0.0,
            max=10.0,
            step=0.05,
            neutral=0.0,
            label_zh="远离权重",
            help="How much the text to go away from counts beside the target: 1 is as much, 0 not at all.",
            help_zh="“远离文字”相对目标文字的权重：0 表示不计，1 表示同等。",
        ),
    ] = 1.0
    sigma_lo: SigmaLo = 0.0
    sigma_hi: SigmaHi = UNLIMITED
    every_k: EveryK = 1
    gradient_clip: GradientClip = UNLIMITED
    scaling: Annotated[
        str,
        Choice(
            options=("raw", "relative"),
            label_zh="强度换算",
            help="raw: the paper's scale; relative: guidance_scale is the fraction of x - denoised that is added (0.1 to 1).",
            help_zh="raw：论文中的强度；relative：所加项占 x - denoised 长度的比例（0.1 到 1）。",
        ),
    ] = "raw"
    mask: Mask = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for (
            tokens
        ) in self._prompts():  # another text encoder's are refused when the rule is made, not at the first step
            self.noisy_clip.check_text(tokens)

    @property
    def followed(self) -> NoisyCLIP:
        return self.noisy_clip

    def _prompts(self) -> tuple[Tensor, ...]:
        target = encodings(self.target, f"the target of {self.node.name}")
        return target if self.away is None else target + encodings(self.away, f"the away input of {self.node.name}")

    def _texts(self) -> tuple[Tensor, Tensor | None]:
        """Unit vectors of the texts to go to (N, E), and of those to go away from."""
        with torch.no_grad():
            features = [self.noisy_clip.text_features(tokens.clone()) for tokens in self._prompts()]
        count = len(encodings(self.target, ""))
        return torch.cat(features[:count]), torch.cat(features[count:]) if features[count:] else None

    def gradient(
        self,
        process: Process,
        x: Tensor,
        sigma: Tensor,
        index: int | None,
        *,
        note: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """``w * grad_u s * similarity(u)`` (B, C, H, W) with respect to u, the unit-variance x; gated, clipped, masked.

        Args:
            process: what x is.
            x: (B, C, H, W) in the coordinates of ``process``.
            sigma: (B,).
            index: of the step, for ``every_k``; None lets every call act.
            note: is given "similarity" (B,), what is pushed up, without s; NaN where the rule does not act.

        Raises:
            UserError: x is not of the CLIP's latents.
        """

        def value(u: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
            image = self.noisy_clip.image_features(u, log_snr)
            target, away = self._texts()
            alike = similarity(image, target, away, self.away_scale)
            return self.noisy_clip.logit_scale * alike, alike

        def heard(alike: Tensor, active: Tensor) -> None:
            if note is not None:
                note("similarity", spread(alike, active))

        return self.pushed(process, x, sigma, index, value, largest=self.gradient_clip, heard=heard)

    def apply(self, step: Step) -> Tensor:
        gradient = self.gradient(step.process, step.x, step.sigma, step.index, note=step.note)
        shift = score_form(step.process, gradient, step.sigma)
        relative = self.scaling == "relative"
        return relative_scale(shift, step.x, step.denoised, self.guidance_scale) if relative else shift
