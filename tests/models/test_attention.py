"""Changed attention in diffusers' U-Net: parity with diffusers' own processors and hooks, for chosen samples alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.attention import AttentionPatch, permutation
from latent_guidance.errors import UserError
from latent_guidance.models.attention import check_patch, layers_of, patched

from ..guidance.networks import noisy, small_unet, words

TIME = torch.tensor(300)
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet()


def run(unet: Any, batch: int = 2) -> Tensor:
    return unet(noisy(batch), TIME, encoder_hidden_states=words(1).expand(batch, -1, -1)).sample


def changed(unet: Any, patch: AttentionPatch, batch: int = 2) -> Tensor:
    with patched(unet, [patch]):
        return run(unet, batch)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.std())


@pytest.mark.parametrize("layers", ["middle", "down", "up", "d1, u2"])
def test_identity_is_diffusers_perturbed_attention(unet: Any, layers: str) -> None:
    """diffusers' processor perturbs the second half of a batch."""
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    theirs = small_unet()
    chosen = {"middle": "m", "down": "d", "up": "u"}.get(layers)
    for name, layer in layers_of(theirs).items():
        if name[0] == chosen or name in layers.split(", "):
            layer.block.attn1.set_processor(PAGIdentitySelfAttnProcessor2_0())
    x, tokens = noisy(), words(1).expand(4, -1, -1)
    expected = theirs(torch.cat([x, x]), TIME, encoder_hidden_states=tokens).sample[2:]
    assert far(expected, changed(unet, AttentionPatch("identity", layers))) < TOLERANCE
    assert far(expected, changed(unet, AttentionPatch("identity", "all"))) > 1e-3


class BlurredQueries:
    """Self-attention written out, with its queries blurred by matrices over rows and columns."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        q, k, v = (part(hidden_states).unflatten(-1, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v))
        picture = q.unflatten(1, (len(self.rows), len(self.columns)))
        q = torch.einsum("ij,kl,bjlhc->bikhc", self.rows, self.columns, picture).flatten(1, 2)
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.shape[-1])
        return attn.to_out[0](torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(2))


def blur_matrix(length: int, sigma: float) -> Tensor:
    wide = math.ceil(6 * sigma)
    half = min(wide + 1 - wide % 2, length + 1 - length % 2) // 2
    matrix = torch.zeros(length, length)
    for i in range(length):
        for offset in range(-half, half + 1):
            place = abs(i + offset)
            matrix[i, min(place, 2 * (length - 1) - place)] += math.exp(-0.5 * (offset / sigma) ** 2)
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("sigma", [0.6, 1.0, math.inf])
def test_blur_is_attention_with_blurred_queries(unet: Any, sigma: float) -> None:
    theirs = small_unet()
    height, width = 3, 4  # the middle of a latent of 6 x 8
    rows, columns = (torch.full((n, n), 1 / n) if math.isinf(sigma) else blur_matrix(n, sigma) for n in (height, width))
    layers_of(theirs)["m0"].block.attn1.set_processor(BlurredQueries(rows, columns))
    expected = run(theirs)
    assert far(expected, changed(unet, AttentionPatch("blur", blur_sigma=sigma))) < TOLERANCE
    assert far(expected, changed(unet, AttentionPatch("blur", blur_sigma=3.0))) > 1e-4
    assert far(run(unet), changed(unet, AttentionPatch("blur", "all", blur_sigma=0.01))) < TOLERANCE


def test_skip_is_diffusers_layer_skip(unet: Any) -> None:
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    theirs = small_unet()
    for where in ("mid_block.attentions.0", "up_blocks.0.attentions.1"):
        config = LayerSkipConfig(indices=[0], fqn=f"{where}.transformer_blocks", skip_attention=True, skip_ff=True)
        apply_layer_skip(theirs, config)
    expected = run(theirs)
    assert far(expected, changed(unet, AttentionPatch("skip", "m0, u1"))) < TOLERANCE
    assert far(expected, changed(unet, AttentionPatch("skip", "m0"))) > 1e-3


def test_shuffle_changes_the_tokens_that_enter_a_layer_and_so_those_that_leave_it(unet: Any) -> None:
    patch = AttentionPatch("shuffle", "m0", seed=3)
    order = permutation(12, patch, "m0")
    into, out_of = small_unet(), small_unet()
    for network, entering in ((into, True), (out_of, False)):
        block = layers_of(network)["m0"].block

        def forward(
            tokens: Tensor, *args: Any, entering: bool = entering, own: Any = block.forward, **more: Any
        ) -> Tensor:
            return own(tokens[:, order], *args, **more) if entering else own(tokens, *args, **more)[:, order]

        block.forward = forward
    ours = changed(unet, patch)
    assert far(run(into), ours) < TOLERANCE and far(run(out_of), ours) < TOLERANCE
    assert far(ours, changed(unet, AttentionPatch("shuffle", "m0", seed=4))) > 1e-3


@pytest.mark.parametrize("op", ["identity", "blur", "skip", "shuffle"])
def test_samples_of_one_batch_are_changed_each_by_itself(unet: Any, op: str) -> None:
    one, other = AttentionPatch(op, "middle, u0"), AttentionPatch(op, "d0", blur_sigma=1.0, seed=1)
    plain, first, second = run(unet, 4), changed(unet, one, 4), changed(unet, other, 4)
    with patched(unet, [None, one, other, one]):
        together = run(unet, 4)
    expected = torch.stack([plain[0], first[1], second[2], first[3]])
    assert far(expected, together) < TOLERANCE
    assert min(far(plain, first), far(plain, second), far(first, second)) > 1e-4
    assert torch.equal(run(unet, 4), plain)  # nothing stays behind


def test_nothing_stays_behind_after_an_error(unet: Any) -> None:
    before = run(unet)
    with pytest.raises(RuntimeError), patched(unet, [AttentionPatch("skip", "all")]):
        unet(noisy(channels := 2)[:, :channels], TIME, encoder_hidden_states=words(1))
    assert torch.equal(run(unet), before)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in unet.modules())


def test_gradients_pass_through_a_changed_layer(unet: Any) -> None:
    x = noisy(2).requires_grad_()
    with patched(unet, [AttentionPatch("identity"), AttentionPatch("skip", "up")]):
        unet(x, TIME, encoder_hidden_states=words(1).expand(2, -1, -1)).sample.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and bool((x.grad != 0).any())


def test_layers_are_named_from_the_input_on_and_others_refused(unet: Any) -> None:
    assert list(layers_of(unet)) == ["d0", "d1", "m0", "u0", "u1", "u2", "u3"]
    assert list(layers_of(small_unet(attention=(False, True)))) == ["d0", "m0", "u0", "u1"]
    check_patch(unet, AttentionPatch("identity", "d1, u3"))
    with pytest.raises(UserError, match="d0 to d1, m0, u0 to u3"):
        check_patch(unet, AttentionPatch("identity", "d2"))
    with pytest.raises(UserError, match="without transformer blocks, which does not let that be changed"):
        check_patch(small_unet(attention=(False, False)), AttentionPatch("skip"))
