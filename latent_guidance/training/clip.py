"""Recipe: a noisy-latent CLIP on top of a text encoder that stays as it is.

The image side sees what the classifier sees: crops of latents, plain and mirrored, at a log-SNR drawn evenly from the schedule's whole
range. Captions are encoded once. The loss is the symmetric one of CLIP: every picture of a batch picks its caption among
the batch's, and every caption its picture. Where a caption fits several pictures of the batch, because it is the same text or the
name of their group, any of them is right.

One picture in ten is held out, chosen by its number alone, and never seen.

Reference: arXiv 2103.00020, figure 3 (the loss); 2112.10741, section 2.4 (on noised pictures).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError
from .classifier import check_draws, drawn_crops, held_out, noised
from .latents import LatentSet, weights_mark
from .loop import LoopSettings, TrainingRun, batch_indices, check_settings
from .unet import DRAWS, KINDS, caption_ids, check_shares

if TYPE_CHECKING:
    from ..models.noisy_clip import NoisyCLIP, NoisyCLIPConfig, NoisyLatentCLIP
    from ..models.text_encoder import TextEncoder

LARGEST_SCALE = 100.0
"""The learned scale of the similarities stays below this, as in CLIP."""
GROUP = KINDS.index("group")


@dataclass(frozen=True)
class CLIPRecipe:
    """Settings of :func:`train_clip`. The shares are of the captions; the rest are captions as they are.
    No share is below 0, and all together are at most 1.

    Attributes:
        batch: Latents, and captions, per step, >= 1 for each set of latents.
        crop: Side of the crops, in latent pixels, >= 1.
        group_only: Share replaced by the group's name.
        with_group: Share to which the group's name is added.
        by_keywords: Share replaced by up to four of the picture's keywords.
        by_other: Share replaced by another caption of the picture.

    Raises:
        UserError: A value out of its range.
    """

    batch: int = 128
    crop: int = 16
    group_only: float = 0.08
    with_group: float = 0.08
    by_keywords: float = 0.20
    by_other: float = 0.10

    def __post_init__(self) -> None:
        check_settings(self, batch=(self.batch >= 1, "at least 1"), crop=(self.crop >= 1, "at least 1"))
        check_shares(self.shares())

    def shares(self) -> Tensor:
        """The share of each of ``KINDS``: (6,), sum 1; the empty prompt goes with no picture and has none."""
        others = [self.with_group, self.group_only, 0.0, self.by_keywords, self.by_other]
        return torch.tensor([1 - sum(others), *others])


@dataclass(frozen=True)
class Captions:
    """Captions, each encoded once.

    Attributes:
        tokens: (U, 77, D) encodings in half precision.
        rows: (6, DRAWS, N) which of them a picture has, by kind and draw as in ``unet.captions``.
        start: (D,) the encoding of the start token; zeros if it is not the same for all captions.
    """

    tokens: Tensor
    rows: Tensor
    start: Tensor


@torch.no_grad()
def encode_captions(encoder: TextEncoder, latents: LatentSet, *, batch: int = 64, progress: bool = True) -> Captions:
    """All captions of all pictures through the text encoder."""
    from tqdm import tqdm

    ids = caption_ids(encoder, latents)
    unique, rows = ids.reshape(-1, ids.shape[-1]).unique(dim=0, return_inverse=True)
    device = encoder.network.positional_embedding.device
    parts = [
        encoder.encode_ids(some.to(device))[0].half().cpu()
        for some in tqdm(unique.split(batch), desc="encoding captions", disable=not progress)
    ]
    tokens = torch.cat(parts)
    starts = tokens[:, 0].float()
    same = bool(((starts - starts[0]).norm(dim=1) <= 0.01 * starts[0].norm()).all())
    return Captions(tokens, rows.reshape(ids.shape[:-1]), starts[0] if same else torch.zeros_like(starts[0]))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, fits: Tensor) -> Tensor:
    """CLIP's loss, (): pictures choose among captions and captions among pictures.

    Args:
        image: (B, E) unit vectors.
        text: (B, E) unit vectors.
        scale: () the inverse temperature.
        fits: (B, B) bool, whether caption j is right for picture i; true on the diagonal.
    """
    logits = scale * image @ text.T
    right = fits.to(logits)
    by_picture = (right / right.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
    by_caption = (right / right.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0)
    return -(by_picture.mean() + by_caption.mean()) / 2


def fitting(rows: Tensor, kinds: Tensor, chosen: Tensor, classes: Tensor) -> Tensor:
    """Whether caption j is right for picture i, (B, B) bool.

    Args:
        rows: (B,) which text a caption is.
        kinds: (B,) of ``KINDS``.
        chosen: (B,) the pictures.
        classes: (B,) their classes.
    """
    same = (rows[:, None] == rows) | (chosen[:, None] == chosen)
    return same | ((kinds == GROUP) & (classes[:, None] == classes))


def train_clip(
    sets: Sequence[LatentSet],
    encoder: TextEncoder,
    run_folder: Path,
    *,
    config: NoisyCLIPConfig,
    settings: LoopSettings,
    recipe: CLIPRecipe | None = None,
    start_from: NoisyCLIP | None = None,
    progress: bool = True,
) -> NoisyCLIP:
    """Train a noisy-latent CLIP, resuming ``run_folder`` if it holds a state.

    Args:
        sets: Latents of the *same* pictures in the same order, at any sizes >= ``recipe.crop``.
        encoder: Encodes the captions; it is not trained.
        run_folder: Where the state is kept.
        config: Latents, noise range and shape.
        settings: See :class:`.loop.LoopSettings`.
        recipe: See :class:`CLIPRecipe`.
        start_from: Whose weights a new run starts from; None for random ones.
        progress: Show a bar.

    Raises:
        UserError: The recipe does not fit the latents, training turned NaN, the state belongs to another network, to other latents or to
            another text encoder, or ``start_from`` has another shape.
    """
    from ..models.noisy_clip import NoisyCLIP, new_noisy_clip

    recipe = CLIPRecipe() if recipe is None else recipe
    check_draws(recipe, sets, batch=recipe.batch, crop=recipe.crop)
    captions = encode_captions(encoder, sets[0], progress=progress)
    classes = sets[0].classes
    seen = torch.nonzero(~held_out(len(classes))).flatten()
    low, high = config.log_snr_range
    torch.manual_seed(settings.seed)
    network = new_noisy_clip(config)
    if start_from is not None:
        _start(network, start_from)
    marks = [*(latents.mark for latents in sets if latents.mark), weights_mark(encoder.network)]
    run = TrainingRun(network.train(), run_folder, settings, data="; ".join(marks), recipe=asdict(recipe))
    network.text_start.copy_(captions.start)
    device, shares = settings.device, recipe.shares()

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen = seen[batch_indices(step, batch=recipe.batch, total=len(seen), seed=settings.seed)]
        chosen = chosen[torch.randperm(recipe.batch, generator=generator)]  # sets take their shares in this order
        kinds = torch.multinomial(shares, recipe.batch, replacement=True, generator=generator)
        draws = torch.randint(DRAWS, (recipe.batch,), generator=generator)
        rows = captions.rows[kinds, draws, chosen]
        x0 = drawn_crops(sets, chosen, size=recipe.crop, generator=generator)
        log_snr = low + (high - low) * torch.rand(recipe.batch, generator=generator)
        x = noised(x0, log_snr, generator=generator).to(device)
        with run.arithmetic():
            image = network.image_embedding(x, log_snr.to(device))
            text = network.text_embedding(captions.tokens[rows].to(device, torch.float32))
        image, text = (functional.normalize(value.float(), dim=1) for value in (image, text))
        scale = network.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
        fits = fitting(rows, kinds, chosen, classes[chosen]).to(device)
        loss = contrastive_loss(image, text, scale, fits)
        picked = (image.detach() @ text.detach().T).argmax(1)
        right = fits[torch.arange(recipe.batch, device=device), picked].float().cpu()
        clear = right[log_snr > 1]
        numbers = {"right": float(right.mean()), "scale": float(scale.detach())}
        return loss, numbers | ({"right_clear": float(clear.mean())} if len(clear) else {})

    run.train(loss_of, progress=progress)
    run.finished()
    network.logit_scale.data.clamp_(max=math.log(LARGEST_SCALE))
    return NoisyCLIP(network)


def _start(network: NoisyLatentCLIP, trained: NoisyCLIP) -> None:
    """Copy the weights of a trained CLIP into a new one of the same shape."""
    try:
        network.load_state_dict(trained.network.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"a noisy-latent CLIP of another shape to start from: {str(error).splitlines()[-1].strip()[:200]}",
            expected="one that this recipe made for a text encoder of the same width",
            mend="start from another one, or from nothing",
        ) from error


@torch.no_grad()
def retrieval_by_noise(
    clip: NoisyCLIP,
    encoder: TextEncoder,
    latents: LatentSet,
    *,
    log_snrs: Sequence[float],
    chosen: Tensor,
    seed: int = 0,
) -> dict[float, dict[str, float]]:
    """How often the right caption is found for the pictures ``chosen`` (N,) bool at each log-SNR; one noise draw each.

    Returns:
        By log-SNR: "caption", the share of pictures whose own caption, among those of all chosen pictures, is the nearest;
        "caption among five", the share for which it is one of the nearest five; "group", the share whose group's name is the nearest
        of the groups' names.
    """
    picked = torch.nonzero(chosen).flatten()
    x0, classes = latents.mean[picked], latents.classes[picked]
    texts = _encoded(clip, encoder, [latents.texts[number] for number in picked.tolist()])
    groups = _encoded(clip, encoder, [label.lower() for label in latents.labels])
    result: dict[float, dict[str, float]] = {}
    for number, level in enumerate(log_snrs):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        log_snr = torch.full((len(x0),), level)
        x = noised(x0, log_snr, generator=generator)
        parts = [clip.image_features(a, b) for a, b in zip(x.split(64), log_snr.split(64), strict=True)]
        image = torch.cat(parts).cpu()
        similarity = image @ texts.T
        rank = (similarity > similarity.diagonal()[:, None]).sum(1)
        by_group = (image @ groups.T).argmax(1) == classes
        result[level] = {
            "caption": float((rank == 0).float().mean()),
            "caption among five": float((rank < 5).float().mean()),
            "group": float(by_group.float().mean()),
        }
    return result


def _encoded(clip: NoisyCLIP, encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Unit vectors (N, E) of prompts, on the CPU."""
    ids = encoder.prompt_ids(prompts).to(encoder.network.positional_embedding.device)
    return torch.cat([clip.text_features(encoder.encode_ids(some)[0]).cpu() for some in ids.split(64)])
