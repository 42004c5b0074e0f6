"""The one evaluation that rules through the denoiser share: when it has a graph, what it costs, and which models it is refused on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_guidance.errors import UserError
from latent_guidance.guidance import (
    CFG,
    DPS,
    MPGD,
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    FreeDoM,
    Guider,
    MomentumGuidance,
    SlidingModeCFG,
    TrainingFreeGuidance,
    UniversalGuidance,
    check_on_model,
)
from latent_guidance.process import VE_SCALED
from latent_guidance.samplers import sample_euler, sample_heun

from .conftest import drawn
from .denoisers import EVERY, THROUGH, InPlace, Model, OutOfPlace, Towards, conds

MEMORIES = [
    MomentumGuidance(),
    SlidingModeCFG(),
    AdaptiveProjectedGuidance(momentum=-0.5, eta=0.5),
    AdaptiveGuidance(threshold=0.9),
]
"""Rules that go by what they saw at the steps before."""


class TestOneEvaluation:
    """One network call a step, with a graph only at the steps at which a rule wants it."""

    sigmas = torch.tensor([2.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)

    def calls(self, *rules: Any) -> list[bool]:
        model = Model(VE_SCALED)
        with torch.inference_mode():
            sample_euler(Guider(model, rules), drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
        return model.calls

    def test_leaf_rules_need_no_graph(self) -> None:
        assert self.calls(MPGD(loss=Towards())) == [False] * 4
        still = {"loss": Towards(), "guidance_scale": 0.0}
        assert self.calls(UniversalGuidance(**still), TrainingFreeGuidance(**still)) == [False] * 4
        assert self.calls(*(rule(loss=Towards(), guidance_scale=0.0) for rule in (DPS, FreeDoM))) == [False] * 4

    def test_several_rules_share_one_graph(self) -> None:
        assert self.calls(*(rule(loss=Towards()) for rule in EVERY)) == [True] * 4

    def test_gates_spare_the_graph_but_for_the_first_step(self) -> None:
        assert self.calls(DPS(loss=Towards(), every_k=2)) == [True, False, True, False]
        assert self.calls(DPS(loss=Towards(), sigma_hi=0.5)) == [True, False, True, True]
        assert self.calls(DPS(loss=Towards(), sigma_lo=0.6)) == [True, True, False, False]

    def test_a_closed_gate_changes_nothing(self) -> None:
        x, labels = drawn(2, 4, 3, 5), conds(2, 1.0)
        plain = sample_euler(Model(VE_SCALED), x, self.sigmas, labels)
        for rule in EVERY:
            closed = Guider(Model(VE_SCALED), [rule(loss=Towards(), sigma_lo=5.0)])
            assert torch.equal(sample_euler(closed, x, self.sigmas, labels), plain)

    @pytest.mark.parametrize("rule_class", THROUGH)
    def test_a_model_that_changes_what_autograd_has_saved_is_evaluated_once_more(self, rule_class: Any) -> None:
        """With copies of it, from then on to the end of the run; the pictures and the report are those of one that does not."""
        found = []
        for model in (InPlace(VE_SCALED), OutOfPlace(VE_SCALED)):
            guider = Guider(model, [rule_class(loss=Towards())], report=True)
            with torch.inference_mode():
                picture = sample_euler(guider, drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
            [chain] = guider.report.chains
            found.append((picture, [row["contributions"] for row in chain.rows]))
            more = type(model) is InPlace
            assert model.calls == [True] * (4 + more) and chain.passes == 4 + more
            assert [row["passes"] for row in chain.rows] == [1 + more, 1, 1, 1]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
        assert len(found[0][1]) == len(found[1][1]) == 4
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert one == {name: pytest.approx(sizes, rel=1e-5) for name, sizes in other.items()}

    def test_the_evaluation_made_again_is_of_every_branch_and_said_beforehand(self) -> None:
        rules = [CFG(guidance_scale=3.0), DPS(loss=Towards())]
        guider = Guider(InPlace(VE_SCALED), rules, uncond=conds(1, 0.0), report=True)
        said = guider.passes(self.sigmas)
        sample_euler(guider, drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
        assert [row["passes"] for row in guider.report.chains[0].rows] == [4, 2, 2, 2]
        assert said.total == 8 and said.through == (DPS.node.name,)
        assert "one step twice if the model changes" in said.text
        assert not Guider(InPlace(VE_SCALED), rules[:1], uncond=conds(1, 0.0)).passes(self.sigmas).through

    def test_the_evaluation_made_again_is_the_first_at_which_the_rule_acts(self) -> None:
        def passes(**window: float) -> list[int]:
            guider = Guider(InPlace(VE_SCALED), [DPS(loss=Towards(), **window)], report=True)
            sample_euler(guider, drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
            return [row["passes"] for row in guider.report.chains[0].rows]

        assert passes(sigma_hi=0.5) == [1, 1, 2, 1] and passes(sigma_lo=5.0) == [1, 1, 1, 1]

    @pytest.mark.parametrize("model_class", [InPlace, OutOfPlace])
    @pytest.mark.parametrize("rules", [[DPS], [MPGD], [MPGD, DPS]], ids=str)
    def test_a_loss_that_changes_what_autograd_has_saved_is_refused_at_once(self, model_class: Any, rules: Any) -> None:
        """Whatever the network does: it is evaluated once, and no copies are made for the loss."""

        class Writes(Towards):
            def __call__(self, estimate: Tensor) -> Tensor:
                kept = torch.tanh(estimate)
                kept += 1.0
                return super().__call__(kept)

        model = model_class(VE_SCALED)
        guider = Guider(model, [rule(loss=Writes(), **({"every_k": 2} if rule is DPS else {})) for rule in rules])
        with pytest.raises(UserError, match=r"Writes.*something is changed in place"):
            sample_euler(guider, drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
        assert len(model.calls) == 1

    def test_a_loss_may_use_torch_func_and_a_network_sparse_tensors_where_copies_are_made(self) -> None:
        class ByFunc(Towards):
            def __call__(self, estimate: Tensor) -> Tensor:
                slope = torch.func.grad(lambda x: (x**3).sum())(estimate.detach())
                return super().__call__(estimate) + (slope * estimate).flatten(1).sum(dim=1)

        class Sparse(Model):
            in_place = False

            def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
                mixed = super().__call__(x, sigma, cond).flatten(1)
                mixed = torch.sparse.mm(torch.eye(mixed.shape[1], dtype=mixed.dtype).to_sparse(), mixed.T).T
                kept = torch.tanh(mixed)
                if self.in_place:
                    kept += 1.0
                else:
                    kept = kept + 1.0
                return kept.reshape(x.shape)

        found = []
        for in_place in (True, False):
            model = Sparse(VE_SCALED)
            model.in_place = in_place
            found.append(
                sample_euler(Guider(model, [DPS(loss=ByFunc())]), drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
            )
            assert len(model.calls) == 4 + in_place
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("before", MEMORIES, ids=lambda rule: type(rule).__name__)
    def test_rules_with_a_memory_remember_the_evaluation_made_again_once(self, before: Any) -> None:
        rules = [CFG(guidance_scale=3.0), before, DPS(loss=Towards(), guidance_scale=0.3)]
        found = [
            sample_euler(Guider(model, rules, uncond=conds(1, 0.0)), drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
            for model in (InPlace(VE_SCALED), OutOfPlace(VE_SCALED))
        ]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("rule_class", THROUGH)
    def test_a_model_without_a_gradient_is_refused_at_the_first_step(self, rule_class: Any) -> None:
        model = Model(VE_SCALED, gradient=False)
        guider = Guider(model, [rule_class(loss=Towards(), sigma_hi=0.3)])
        with pytest.raises(UserError, match="no gradient with respect to x"):
            sample_euler(guider, drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))
        assert len(model.calls) == 1
        sample_euler(Guider(model, [MPGD(loss=Towards())]), drawn(2, 4, 3, 5), self.sigmas, conds(2, 1.0))

    @pytest.mark.parametrize("rule_class", THROUGH)
    def test_rules_through_the_denoiser_are_refused_on_a_model(self, rule_class: Any) -> None:
        with pytest.raises(UserError, match="connect the rule to Guider"):
            check_on_model([rule_class(loss=Towards())])
        check_on_model([MPGD(loss=Towards()), rule_class(loss=Towards(), guidance_scale=0.0)])

    @pytest.mark.parametrize("before", MEMORIES[:3], ids=lambda rule: type(rule).__name__)
    def test_rules_with_a_memory_hold_no_graph_from_step_to_step(self, before: Any) -> None:
        """In inference mode, as in a node graph; with gates, so that steps with and without a graph alternate."""
        rules = [CFG(guidance_scale=3.0), before, DPS(loss=Towards(), every_k=2)]
        x, labels = drawn(2, 4, 3, 5), conds(2, 1.0)
        runs = []
        for mode in (True, False):
            with torch.inference_mode(mode):
                guider = Guider(Model(VE_SCALED), rules, uncond=conds(1, 0.0))
                runs += [sample_heun(guider, x, self.sigmas, labels) for _ in range(2)]
        assert all(torch.equal(run, runs[0]) for run in runs[1:]) and torch.isfinite(runs[0]).all()

    def test_the_gradient_passes_through_what_guided_the_estimate(self) -> None:
        """With CFG before it, it is the Jacobian of the guided estimate, not of the conditional one."""
        x, sigma, labels = drawn(2, 4, 3, 5), conds(2, 0.8), conds(2, 1.0)
        model, scale = Model(VE_SCALED), 3.0
        leaf = x.clone().requires_grad_()
        cond, uncond = model(leaf, sigma, labels), model(leaf, sigma, conds(2, 0.0))
        guided = uncond + scale * (cond - uncond)
        (gradient,) = torch.autograd.grad(Towards()(guided).sum(), leaf)
        expected = guided - 0.4 * 0.8**2 * gradient
        rules = [CFG(guidance_scale=scale), DPS(loss=Towards(), guidance_scale=0.4, scaling="score")]
        ours = Guider(model, rules, uncond=conds(1, 0.0))(x, sigma, labels)
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-10, atol=1e-10)


def test_half_precision_gradients_do_not_vanish_on_their_way() -> None:
    """A loss so weak that its gradient is no number of half precision still pulls, since samples are brought to 1 on the way."""

    class Half:
        process = VE_SCALED

        def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return torch.tanh(x.half()).float()

    class Weak:
        space = "latent"

        def __call__(self, estimate: Tensor) -> Tensor:
            return 1e-9 * estimate.square().flatten(1).sum(dim=1)

    x, sigma = drawn(2, 4, 3, 5).float(), conds(2, 0.8).float()
    guided = Guider(Half(), [DPS(loss=Weak())])(x, sigma)
    assert ((guided - Half()(x, sigma)).flatten(1).norm(dim=1) > 0.01).all()
