"""Recipe: a text-conditioned UNet and its text tower, jointly, from nothing, on cached latents.

The UNet predicts v = alpha * noise - sigma * x0 (VP coordinates, arXiv 2202.00512) with the plain squared error. One
caption in ten is replaced by the empty prompt *through the text tower*, so the encoding of "" is the learned null condition.
Some captions name the group, alone or after the name, so that prompts such as "flags" work; some are a few keywords,
or another caption of the picture, where it has them.

Only the rows of the token table that captions use are trained; at the end every other row is their mean, so that a word
the captions never held says nothing in particular.

A small network that has learned the pictures only in part draws from the empty prompt what lies between them. It learns to draw
more decidedly from two stages of its own training: what the empty prompt shall give is then not the noise but the later one's answer
pushed away from the earlier one's, weak + sharpness * (strong - weak), while what is drawn is being settled. At lower noise it stays the
noise: pushed there too, the empty prompt would be a bad one for classifier-free guidance to lead away from.

Reference: arXiv 2406.02507, section 3 (guiding with a bad version of the network); 2210.03142, section 3.1 (learning what a guided
network says).
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..denoiser import repeat_cond
from ..errors import UserError
from .latents import LatentSet
from .loop import STATE_FILE, LoopSettings, StepLoss, TrainingRun, batch_indices, check_settings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ..models.text_encoder import TextEncoder


def check_shares(shares: Tensor) -> None:
    """Raise UserError unless none of the shares (6,) of the ``KINDS`` of captions, whose first is what the others leave, is below 0."""
    if not bool((shares >= 0).all()):
        listed = ", ".join(
            f"{kind or 'empty prompt'} {share:.3g}" for kind, share in zip(KINDS, shares.tolist(), strict=True)
        )
        raise UserError(
            f"shares of captions {listed}",
            expected="none below 0, and at most 1 for all that replaces captions",
            mend="lower the shares",
        )


@dataclass(frozen=True)
class UNetRecipe:
    """Settings of :func:`train_unet`.

    Attributes:
        batch: Latents per step, >= 1.
        time_power: A time is drawn as a uniform number to this power, > 0; 1 is even, less favours high noise, where the
            caption decides.
        drop: Share of captions replaced by the empty prompt. No share is below 0, and all together are at most 1.
        group_only: Share replaced by the group's name.
        with_group: Share to which the group's name is added.
        by_keywords: Share replaced by up to four of the picture's keywords.
        by_other: Share replaced by another caption of the picture.
        sharpness: How far what is learned for the empty prompt is pushed away from the weaker network, >= 1; of no effect without one.
        sharp_below: The log-SNR below which it is.
        text_width: Width of the text tower, a multiple of 64.
        text_layers: Its depth, >= 1.
        unet: Further arguments of ``models.unet.unet_config``.

    Raises:
        UserError: A value out of its range.
    """

    batch: int = 32
    time_power: float = 0.4
    drop: float = 0.10
    group_only: float = 0.05
    with_group: float = 0.08
    by_keywords: float = 0.15
    by_other: float = 0.10
    sharpness: float = 2.0
    sharp_below: float = 0.4
    text_width: int = 128
    text_layers: int = 4
    unet: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(
            self,
            batch=(self.batch >= 1, "at least 1"),
            time_power=(0 < self.time_power < math.inf, "above 0 and finite"),
            sharpness=(1 <= self.sharpness < math.inf, "at least 1 and finite"),
            sharp_below=(not math.isnan(self.sharp_below), "a number"),
            text_width=(self.text_width >= 64 and self.text_width % 64 == 0, "a multiple of 64"),
            text_layers=(self.text_layers >= 1, "at least 1"),
        )
        check_shares(self.shares())

    def shares(self) -> Tensor:
        """The share of each of the ``KINDS`` of captions: (6,), sum 1."""
        others = [self.with_group, self.group_only, self.drop, self.by_keywords, self.by_other]
        return torch.tensor([1 - sum(others), *others])

    def dropping(self, drop: float) -> UNetRecipe:
        """The same with another share of empty prompts, 0 to 1; the other captions share the rest as they did."""
        kept = (1 - drop) / (1 - self.drop) if self.drop < 1 else 0.0
        names = ("group_only", "with_group", "by_keywords", "by_other")
        return replace(self, drop=drop, **{name: kept * getattr(self, name) for name in names})


def train_unet(
    latents: LatentSet,
    run_folder: Path,
    *,
    settings: LoopSettings,
    recipe: UNetRecipe | None = None,
    scheduler_config: dict[str, Any] | None = None,
    start_from: Path | None = None,
    away_from: Path | None = None,
    progress: bool = True,
) -> tuple[UNet2DConditionModel, TextEncoder]:
    """Train UNet and text tower, resuming ``run_folder`` if it holds a state.

    Args:
        latents: What is learned, with its captions.
        run_folder: Where the state is kept.
        settings: See :class:`.loop.LoopSettings`.
        recipe: See :class:`UNetRecipe`.
        scheduler_config: diffusers' scheduler config; None for Stable Diffusion's schedule.
        start_from: Checkpoint folder whose UNet and text tower a new run starts from; None for random weights.
        away_from: Checkpoint folder of a weaker version of ``start_from``; what the empty prompt shall give is then not the noise but
            the answer of ``start_from`` pushed away from it. None for the noise.
        progress: Show a bar.

    Returns:
        The UNet and the text encoder with averaged weights, in eval mode.

    Raises:
        UserError: Training turned NaN, the state or ``start_from`` belongs to another network, the state belongs to other latents,
            ``scheduler_config`` is not that of a v-network, or ``away_from`` is given without ``start_from``.
    """
    recipe = UNetRecipe() if recipe is None else recipe
    joint = _Joint(latents, run_folder, settings, recipe, start_from)
    sharp = None if away_from is None else _Sharpened(start_from, away_from, recipe.sharpness, settings.device)
    joint.run.train(_loss(joint, latents, settings, recipe, scheduler_config, sharp), progress=progress)
    return joint.finished()


def averaged_unet(
    latents: LatentSet, run_folder: Path, *, settings: LoopSettings, recipe: UNetRecipe | None = None
) -> tuple[UNet2DConditionModel, TextEncoder]:
    """UNet and text encoder with the averaged weights of a run that need not be finished.

    Raises:
        UserError: The folder holds no state, or that of another network or of other latents.
    """
    if not (state := Path(run_folder) / STATE_FILE).is_file():
        raise UserError(
            f"{state} was not found: there are no trained weights to write",
            expected="the folder of a run that was begun",
            mend="give the folder of the runs that training wrote to, or train first",
        )
    return _Joint(latents, run_folder, settings, UNetRecipe() if recipe is None else recipe).finished()


KINDS = ("caption", "caption, group", "group", "", "keywords", "other")
DRAWS = 8
"""Different sets of keywords, and of other captions, that a picture is shown with."""


def captions(latents: LatentSet, *, seed: int = 0) -> list[list[list[str]]]:
    """What each picture is called: [kind][draw][picture], kinds as in ``KINDS``; the first four have one draw."""
    groups = [latents.labels[int(number)].lower() for number in latents.classes]
    both = [f"{text}, {group}" for text, group in zip(latents.texts, groups, strict=True)]
    choose = random.Random(seed)

    def some_keywords(number: int) -> str:
        words = latents.keywords[number] if latents.keywords else ()
        count = choose.randint(1, min(4, len(words))) if words else 0
        return ", ".join(choose.sample(words, count)) or latents.texts[number]

    def other(number: int) -> str:
        texts = latents.other_texts[number] if latents.other_texts else ()
        return choose.choice(texts or (latents.texts[number],))

    everything = range(len(latents))
    keywords = [[some_keywords(number) for number in everything] for _ in range(DRAWS)]
    others = [[other(number) for number in everything] for _ in range(DRAWS)]
    return [[list(latents.texts)], [both], [groups], [[""] * len(latents)], keywords, others]


def caption_ids(encoder: TextEncoder, latents: LatentSet, *, seed: int = 0) -> Tensor:
    """Token ids (6, DRAWS, N, 77) of :func:`captions`; kinds of one draw have it DRAWS times."""
    kinds = []
    for draws in captions(latents, seed=seed):
        ids = torch.stack([encoder.prompt_ids(texts) for texts in draws])
        kinds.append(ids.expand(DRAWS, -1, -1))
    return torch.stack(kinds)


class _Joint:
    """UNet and text tower as one network in training, with the token table cut down to the captions' rows."""

    def __init__(
        self,
        latents: LatentSet,
        run_folder: Path,
        settings: LoopSettings,
        recipe: UNetRecipe,
        start_from: Path | None = None,
    ) -> None:
        from ..models.text_encoder import new_text_encoder, text_config
        from ..models.unet import new_unet, unet_config

        torch.manual_seed(settings.seed)
        self.encoder = new_text_encoder(text_config(width=recipe.text_width, layers=recipe.text_layers))
        channels, side = latents.mean.shape[1], latents.mean.shape[-1]
        config = {"latent_channels": channels, "sample_size": side, "token_width": recipe.text_width}
        self.unet = new_unet(unet_config(**{**config, **recipe.unet}))
        if start_from is not None:
            _start(self.unet, self.encoder, start_from)
        self.used, self.rows = caption_ids(self.encoder, latents).unique(return_inverse=True)
        tower = self.encoder.network
        tower.token_embedding = nn.Embedding.from_pretrained(tower.token_embedding.weight[self.used], freeze=False)
        network = nn.ModuleDict({"unet": self.unet, "text": tower})
        self.run = TrainingRun(network.train(), run_folder, settings, data=latents.mark, recipe=asdict(recipe))

    def finished(self) -> tuple[UNet2DConditionModel, TextEncoder]:
        """The networks with averaged weights and the whole token table, in eval mode."""
        self.run.finished()
        tower = self.encoder.network
        rows = tower.token_embedding.weight.detach()
        table = rows.mean(0).repeat(int(self.encoder.config["vocab_size"]), 1)
        table[self.used] = rows
        tower.token_embedding = nn.Embedding.from_pretrained(table)
        return self.unet, self.encoder


def _start(unet: UNet2DConditionModel, encoder: TextEncoder, folder: Path) -> None:
    """Copy the weights of a checkpoint folder's UNet and text tower into new ones of the same shape."""
    from ..models.checkpoint import load_text_encoder, load_unet

    for network, trained in ((unet, load_unet(folder)), (encoder.network, load_text_encoder(folder).network)):
        try:
            network.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"{folder} holds networks of another shape than the recipe's: {str(error).splitlines()[-1].strip()[:200]}",
                expected="a checkpoint that this recipe made",
                mend="start from another checkpoint, or from nothing",
            ) from error


class _Sharpened:
    """What the empty prompt shall give by two frozen stages of a network: weak + sharpness * (strong - weak), v (B, C, h, w)."""

    def __init__(self, strong: Path | None, weak: Path, sharpness: float, device: str) -> None:
        from ..models.checkpoint import load_text_encoder, load_unet
        from ..models.unet import ConditionedUNet

        if strong is None:
            raise UserError(
                f"a run away from {weak} that starts from nothing",
                expected="the stronger network too, which the run starts from",
                mend="give start_from, or leave away_from out",
            )
        self.sharpness = sharpness
        self.networks = [ConditionedUNet(load_unet(folder, device=device)) for folder in (strong, weak)]
        self.conds = [load_text_encoder(folder, device=device).encode("")[0] for folder in (strong, weak)]

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        strong, weak = (
            network(x, timestep, repeat_cond(cond, len(x))).float()
            for network, cond in zip(self.networks, self.conds, strict=True)
        )
        return weak + self.sharpness * (strong - weak)


def _loss(
    joint: _Joint,
    latents: LatentSet,
    settings: LoopSettings,
    recipe: UNetRecipe,
    scheduler_config: dict[str, Any] | None,
    sharp: _Sharpened | None,
) -> StepLoss:
    from ..models.tiny import SCHEDULER_CONFIG
    from ..parameterization import V
    from ..schedules import schedule_from_config

    schedule, predicted = schedule_from_config(SCHEDULER_CONFIG if scheduler_config is None else scheduler_config)
    if predicted is not V:
        raise UserError(
            f"a scheduler config of a network that predicts {predicted.name}",
            expected="prediction_type v_prediction: the UNet is trained on v in VP coordinates",
            mend='set "prediction_type" to "v_prediction", or leave scheduler_config out',
        )
    sigmas = schedule.sigmas.double()
    alphas = (1 / (1 + sigmas**2).sqrt()).float()
    noise_scales = (sigmas / (1 + sigmas**2).sqrt()).float()
    noisy = -2 * sigmas.log() < recipe.sharp_below
    unet, tower, device = joint.unet, joint.encoder.network, settings.device
    shares = recipe.shares()

    def network(x: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        return unet(x, timestep, encoder_hidden_states=tower(ids)[1]).sample

    network = joint.run.compiled(network)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen = batch_indices(step, batch=recipe.batch, total=len(latents), seed=settings.seed)
        x0 = latents.draw(chosen, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        # one draw in each of `batch` equal stretches: the same law, less variance
        stretch = torch.randperm(recipe.batch, generator=generator)
        place = (stretch + torch.rand(recipe.batch, generator=generator)) / recipe.batch
        timestep = (place**recipe.time_power * len(sigmas)).long().clamp_max(len(sigmas) - 1)
        alpha, sigma = (scale[timestep].reshape(-1, 1, 1, 1) for scale in (alphas, noise_scales))
        kind = torch.multinomial(shares, recipe.batch, replacement=True, generator=generator)
        draw = torch.randint(DRAWS, (recipe.batch,), generator=generator)
        x, v = (alpha * x0 + sigma * noise).to(device), (alpha * noise - sigma * x0).to(device)
        with joint.run.arithmetic():
            if sharp is not None and bool((pushed := (kind == KINDS.index("")) & noisy[timestep]).any()):
                v[pushed] = sharp(x[pushed], timestep[pushed].to(device))
            output = network(x, timestep.to(device), joint.rows[kind, draw, chosen].to(device))
        return (output.float() - v).square().mean(), {}

    return loss_of
