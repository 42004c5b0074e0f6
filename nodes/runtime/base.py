"""What a node may ask of the program it runs in.

The types MODEL, CLIP, VAE, CONDITIONING, GUIDER, SAMPLER, NOISE are the runtime's own objects: nodes pass them on and never
look inside. Three are the same everywhere, as in ComfyUI: LATENT is ``{"samples": (B, C, h, w)}``, unscaled; IMAGE is
(B, H, W, 3) fp32 in [0, 1]; SIGMAS is (N + 1,) descending.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from ...latent_guidance.guidance.passes import Passes

Kind = Literal["checkpoint", "vae", "text_encoder", "unet", "classifier", "noisy_clip", "picture_clip"]


class Runtime(Protocol):
    """A program that nodes run in: a module or an object with exactly these functions."""

    def names(self, kind: Kind) -> list[str]:
        """What can be loaded, for a combo box: the bundled ``emoji`` first, then the user's own; read anew at each call."""
        ...

    def load_checkpoint(self, name: str) -> tuple[Any, Any, Any]:
        """(MODEL, CLIP, VAE) of a checkpoint folder."""
        ...

    def load_vae(self, name: str) -> Any:
        """VAE of a checkpoint folder."""
        ...

    def load_text_encoder(self, name: str) -> Any:
        """CLIP of a checkpoint folder."""
        ...

    def load_unet(self, name: str) -> Any:
        """MODEL of a checkpoint folder."""
        ...

    def load_classifier(self, name: str) -> Any:
        """A noisy-latent classifier: an object with ``.config`` and ``.logits(x_unit, log_snr) -> (B, K)``."""
        ...

    def load_noisy_clip(self, name: str) -> Any:
        """A noisy-latent CLIP: an object with ``.config``, ``.image_features(x_unit, log_snr)`` and ``.text_features(tokens)``."""
        ...

    def load_picture_clip(self, name: str) -> Any:
        """A CLIP on clean pictures (see the library's guidance.losses.clip_text), of an open_clip folder."""
        ...

    def picture_clip(self, clip_vision: Any, clip: Any) -> Any:
        """A CLIP on clean pictures, of a CLIP_VISION and the CLIP that belongs to it."""
        ...

    def encode_text(self, clip: Any, text: str) -> Any:
        """CONDITIONING of a prompt, with ComfyUI's syntax for weights."""
        ...

    def encode_image(self, vae: Any, image: Tensor, *, sample: bool, seed: int) -> Tensor:
        """Unscaled latents of ``image``; with ``sample`` item i is drawn from the posterior with seed + i, else its mode."""
        ...

    def decode_latent(self, vae: Any, samples: Tensor) -> Tensor:
        """IMAGE of unscaled latents."""
        ...

    def decoder(self, vae: Any) -> Any:
        """A VAE as guidance rules see it: a Decoder (see the library's guidance.decoding), through which gradients flow."""
        ...

    def make_guider(
        self, model: Any, positive: Any, negative: Any | None, rules: Sequence[Any], *, report: bool = False
    ) -> Any:
        """GUIDER that applies ``rules``; with ``report`` every run keeps its report, to be found by its latents."""
        ...

    def guider_passes(self, guider: Any, sigmas: Tensor | None = None) -> Passes:
        """What a GUIDER of :meth:`make_guider` costs in network passes, over ``sigmas`` (N + 1,) or the model's noise range."""
        ...

    def patch_model(self, model: Any, rules: Sequence[Any], *, report: bool = False) -> Any:
        """MODEL that applies ``rules`` under whatever samples it, and keeps its report if asked to."""
        ...

    def make_sampler(
        self, function: Callable[..., Tensor], options: Mapping[str, Any], step_rules: Sequence[Any] = ()
    ) -> Any:
        """SAMPLER of a library ``sample_*`` function; item i of a batch draws its step noise with the NOISE's seed + i."""
        ...

    def seeded_noise(self, seeds: Sequence[int]) -> Any:
        """NOISE whose item i depends on ``seeds[i]`` alone."""
        ...

    def show_text(self, text: str) -> None:
        """Show ``text`` on the node that is running, where the program has a canvas; plain text, lines kept."""
        ...
