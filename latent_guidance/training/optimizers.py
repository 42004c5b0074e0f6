"""The optimiser of a training run: Muon for matrices, AdamW for everything else; or AdamW for all.

Muon moves a matrix by its momentum with all singular values made (about) equal, so that what few pictures ask for is learned as fast
as what many do. A convolution (out, in, k, k) is the matrix (out, in * k * k). Input and output layers, embeddings, norms and biases
are AdamW's, as Muon's author advises.

Reference: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the step is scaled to the root mean
square of AdamW's, arXiv 2502.16982, eq. 4, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

NOT_HIDDEN = ("token_embedding", "positional_embedding", "conv_in", "conv_out", "stem", "head")
"""What Muon leaves alone, by a part of the name."""


class TrainingOptimizer:
    """One step for all parameters.

    Args:
        parameters: by name; contiguous if ``muon``.
        learning_rate: to begin with.
        weight_decay: decoupled decay, of both.
        muon: whether matrices are Muon's.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float, muon: bool
    ) -> None:
        self.parameters = dict(parameters)
        hidden = [name for name, p in parameters.items() if muon and _is_hidden(name, p)]
        self._matrices = {name: nn.Parameter(parameters[name].detach().flatten(1)) for name in hidden}
        others = {name: p for name, p in parameters.items() if name not in self._matrices}
        self._owner: dict[str, torch.optim.Optimizer] = {}
        if others:
            adamw = torch.optim.AdamW(
                others.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
            )
            self._owner |= dict.fromkeys(others, adamw)
        if self._matrices:
            muon_optimizer = torch.optim.Muon(
                self._matrices.values(), lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self._owner |= dict.fromkeys(self._matrices, muon_optimizer)
        self._all = list(dict.fromkeys(self._owner.values()))

    def step(self, learning_rate: float) -> None:
        """Move every parameter by its ``grad``."""
        for name, matrix in self._matrices.items():
            gradient = self.parameters[name].grad
            matrix.grad = None if gradient is None else gradient.flatten(1)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by "kind.name of the parameter"."""
        found: dict[str, Tensor] = {}
        for name, optimizer in self._owner.items():
            own = optimizer.state.get(self._matrices.get(name, self.parameters[name]), {})
            found |= {f"{key}.{name}": value for key, value in own.items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave; parameters that it does not hold start afresh.

        Raises:
            ValueError: A tensor of another shape.
        """
        for name, optimizer in self._owner.items():
            mine = self._matrices.get(name, self.parameters[name])
            keys = ("momentum_buffer",) if name in self._matrices else ("exp_avg", "exp_avg_sq", "step")
            if all(f"{key}.{name}" in state for key in keys):
                found = {key: state[f"{key}.{name}"] for key in keys}
                if wrong := [key for key in keys if found[key].shape != (() if key == "step" else mine.shape)]:
                    raise ValueError(f"{wrong[0]}.{name} of shape {tuple(found[wrong[0]].shape)}")
                optimizer.state[mine] = {key: value.to(mine.device).clone() for key, value in found.items()}


def _is_hidden(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1 and not any(part in name for part in NOT_HIDDEN)
