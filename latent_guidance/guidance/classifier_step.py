"""What the classifier rules that act inside a sampler's step share: a plain callable for the sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..process import Process, expand
from .base import Stage
from .knobs import Choice
from .noisy_classifier import ClassifierRule
from .run import step_index


@dataclass(frozen=True, kw_only=True)
class ClassifierStepRule(ClassifierRule):
    """Base of the two rules that act inside a sampler's step.

    There is no *relative* scaling: it holds a change of the estimate D to a share of x - D, and these rules leave D as it is and
    move x, by the step's variance (mean shift) or by no unit at all (post-step). Either rescaled to D's unit is the score form,
    which Classifier Guidance is; there it can be had.
    """

    stage: ClassVar[Stage] = Stage.STEP
    sampler_option: ClassVar[str]
    """The option of ``sample_ddpm`` that takes :meth:`step_gradient`."""

    scaling: Annotated[
        str,
        Choice(
            options=("raw", "entropy"),
            label_zh="强度换算",
            help="raw: the papers' scale; entropy: raised where the classifier is already sure. Relative is measured in the estimate, "
            "which these rules leave alone: Classifier Guidance has it.",
            help_zh="raw：论文中的强度；entropy：分类器已有把握时提高强度。"
            "relative 以去噪估计为单位，而这两种规则不改动估计：请用“分类器引导”。",
        ),
    ] = "raw"

    def step_gradient(
        self, process: Process, sigmas: Tensor | None = None, note: Callable[[str, Tensor], None] | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """``gradient(x, sigma) -> w * grad_x log p(y | x)`` for x (B, C, H, W) in the coordinates of ``process``, sigma (B,).

        Args:
            process: what x is.
            sigmas: the run's noise levels (N + 1,), or None if unknown.
            note: takes the probability (B,) of the label, for a report; None where nobody keeps one.
        """

        def gradient(x: Tensor, sigma: Tensor) -> Tensor:
            index = step_index(sigma, sigmas)
            unit_gradient = self.gradient(process, x, sigma, index, by_entropy=self.scaling == "entropy", note=note)
            return expand(process.unit_scale(sigma), x) * unit_gradient

        return gradient

    def sampler_options(self) -> dict[str, object]:
        """Further options of ``sample_ddpm`` that belong to the rule."""
        return {}
