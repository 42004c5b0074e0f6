"""The training loop: Muon and AdamW, cosine learning rate, moving average of the weights, a resumable state without pickle.

A run is a folder. ``state.safetensors`` holds the networks, their averages, the optimiser's moments and, in its
metadata, the step and the settings. Every random number of step ``k`` comes from a generator seeded with
(seed, k), so a run that is stopped and resumed continues bit for bit without any random state to save.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import check_device
from ..errors import UserError, shown
from .optimizers import TrainingOptimizer

StepLoss = Callable[[int, torch.Generator], tuple[Tensor, Mapping[str, float]]]
"""(step, generator of that step) -> (scalar loss, named numbers for the log)."""

STATE_FILE = "state.safetensors"
LARGEST = 1e6
"""Of learning rate and weight decay: more leaves what 32 bits hold at once."""


def check_settings(settings: object, **fields: tuple[bool, str]) -> None:
    """Raise UserError for the first field, name=(whether it holds, what is expected), of ``settings`` that does not hold."""
    for name, (holds, expected) in fields.items():
        if not holds:
            raise UserError(
                f"{name} = {getattr(settings, name)!r} in {type(settings).__name__}",
                expected=expected,
                mend=f"correct {name}",
            )


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, and how often to save.

    Attributes:
        steps: Number of optimiser steps, >= 1.
        learning_rate: Peak learning rate, > 0.
        warmup: Steps of linear rise before the peak, >= 0.
        decay: The share of the run, in (0, 1], at whose end the rate falls from the peak to nothing along a cosine. Less
            than 1 suits a long run that is looked at on the way: the averaged weights of the level part are usable.
        weight_decay: Decoupled decay, >= 0.
        muon: Matrices are moved by Muon, see :mod:`.optimizers`; without it everything is AdamW's.
        clip: Largest gradient norm, > 0.
        ema_decay: Decay of the averaged weights, in [0, 1).
        seed: Seed of everything random in the run.
        minutes: Stop (with the learning rate at nothing) after this much training time, > 0, even if steps remain; None
            for no limit. A run that a time limit ended is not reproducible step for step.
        save_minutes: Time between saved states, >= 0.
        log_every: Steps between log lines, >= 1.
        device: "cpu" or "cuda". Random numbers are drawn on the CPU either way.
        bf16: Compute in bfloat16 (weights stay float32).
        compile: Compile the forward and backward pass first (needs a C++ compiler): one or two minutes, then a fifth less
            time a step on the CPU.

    Raises:
        UserError: A value out of its range.
    """

    steps: int
    learning_rate: float
    warmup: int = 50
    decay: float = 1.0
    weight_decay: float = 0.0
    muon: bool = False
    clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    minutes: float | None = None
    save_minutes: float = 3.0
    log_every: int = 25
    device: str = "cpu"
    bf16: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self,
            steps=(self.steps >= 1, "at least 1"),
            learning_rate=(0 < self.learning_rate <= LARGEST, f"above 0, at most {LARGEST:g}"),
            warmup=(self.warmup >= 0, "at least 0"),
            decay=(0 < self.decay <= 1, "above 0 and at most 1"),
            weight_decay=(0 <= self.weight_decay <= LARGEST, f"from 0 to {LARGEST:g}"),
            clip=(self.clip > 0, "above 0"),
            ema_decay=(0 <= self.ema_decay < 1, "at least 0 and below 1"),
            minutes=(self.minutes is None or self.minutes > 0, "above 0, or none"),
            save_minutes=(self.save_minutes >= 0, "at least 0"),
            log_every=(self.log_every >= 1, "at least 1"),
            seed=(0 <= self.seed < 2**62, "a whole number from 0 to 2**62"),
        )
        check_device(self.device)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


FIXED = ("seed", "muon", "weight_decay", "clip", "ema_decay", "bf16")
"""Settings of the loop that a run keeps to its end; the others may be changed when it goes on."""


class TrainingRun:
    """One network, its average, its optimiser and its folder.

    Args:
        network: What is trained; several networks go into one ``nn.ModuleDict``.
        folder: Where the state is kept; an existing state is resumed.
        settings: See :class:`LoopSettings`.
        data: A mark of what it is trained on. A state that was trained on other data is refused; one without a mark is taken, as is
            any if this is empty.
        recipe: How it is trained, as JSON values; a state that was trained otherwise, or with other settings of :data:`FIXED`, is refused.

    Raises:
        UserError: The folder holds a damaged state, that of another network, or of a run on other data or with other settings.
    """

    def __init__(
        self,
        network: nn.Module,
        folder: Path,
        settings: LoopSettings,
        *,
        data: str = "",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        on_gpu = settings.device != "cpu"
        self.network = network.to(settings.device)
        if on_gpu and not settings.muon:  # convolutions on tensor cores read channels last
            network.to(memory_format=torch.channels_last)
        self.folder = Path(folder)
        self.settings = settings
        self.data = data
        fixed = {name: getattr(settings, name) for name in FIXED}
        self.fixed = json.loads(json.dumps({**fixed, **(recipe or {})}))  # as they come back from a file
        self.step = 0
        self.seconds = 0.0
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = TrainingOptimizer(
            self.parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            muon=settings.muon,
        )
        if (self.folder / STATE_FILE).is_file():
            self._load()

    def train(self, loss_of: StepLoss, *, progress: bool = True) -> None:
        """Train until the settings' steps or minutes are used up, saving now and then and at the end.

        An interrupt (Ctrl-C or SIGTERM) saves and raises KeyboardInterrupt.

        Raises:
            KeyboardInterrupt: The run was asked to stop; it can be resumed.
            UserError: The loss or the gradient is not finite; the last saved state is left as it is.
        """
        from tqdm import tqdm

        stop = _StopFlag()
        shown = dict[str, float]()
        last_save = last_log = time.monotonic()
        last_log_step = self.step
        with stop, tqdm(total=self.settings.steps, initial=self.step, mininterval=1, disable=not progress) as bar:
            while self.progress() < 1.0 and not stop.asked:
                began = time.monotonic()
                shown = self._one_step(loss_of)
                now = time.monotonic()
                self.seconds += now - began
                bar.update()
                if self.step % self.settings.log_every == 0 or self.progress() >= 1.0:
                    pace = (now - last_log) / max(1, self.step - last_log_step)
                    last_log, last_log_step = now, self.step
                    self._log({**shown, "lr": self._rate(), "seconds_per_step": pace})
                    bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
                if now - last_save > 60 * self.settings.save_minutes:
                    self.save()
                    last_save = now
        self.save()
        if stop.asked:
            raise KeyboardInterrupt(f"stopped at step {self.step}; the state is in {self.folder}")

    def progress(self) -> float:
        """How much of the run is done, in [0, 1]: by steps or by minutes, whichever is further."""
        done = self.step / self.settings.steps
        if self.settings.minutes is not None:
            done = max(done, self.seconds / (60 * self.settings.minutes))
        return min(1.0, done)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Where the network's forward pass belongs: bfloat16 if the settings ask for it, and attention that suits the device.

        On the CPU attention is written out: on sequences as short as these its backward pass takes a third to a fifth of
        the fused kernel's time.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel

        device = self.settings.device
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=self.settings.bf16))
            if device == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def compiled(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``forward`` itself, or compiled if the settings ask for it."""
        return torch.compile(forward) if self.settings.compile else forward

    def averaged(self) -> dict[str, Tensor]:
        """The network's state dict with the averaged weights in place of the trained ones."""
        weights: dict[str, Tensor] = dict(self.network.state_dict())
        return {**weights, **self.ema}

    def finished(self) -> nn.Module:
        """The network with its averaged weights, in eval mode, without gradients."""
        self.network.load_state_dict(self.averaged())
        self.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return self.network.eval().requires_grad_(False)

    def save(self) -> None:
        """Write the state under a temporary name, then rename it.

        Raises:
            UserError: A weight is not finite; the last saved state is left as it is.
        """
        from ..models.files import write_safetensors

        if not all(map(_finite, (*self.parameters.values(), *self.ema.values()))):
            raise self._stopped("weights that are not finite")
        tensors = {f"network.{name}": value.detach() for name, value in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        metadata = {
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "settings": json.dumps(self.fixed),
            "data": self.data,
        }
        write_safetensors(self.folder / STATE_FILE, tensors, dtype=torch.float32, metadata=metadata)

    def _one_step(self, loss_of: StepLoss) -> dict[str, float]:
        loss, shown = loss_of(self.step, step_generator(self.settings.seed, self.step))
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise self._stopped(f"loss {float(loss.detach()):.4g}, gradient norm {float(norm):.4g}")
        self.optimizer.step(self._rate())
        self.step += 1
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
        return {"loss": float(loss.detach()), **shown, "grad_norm": float(norm)}

    def _stopped(self, found: str) -> UserError:
        saved = self.folder / STATE_FILE
        kept = f"the last good state is {saved}" if saved.is_file() else "no state was saved yet"
        return UserError(
            f"Training stopped at step {self.step}: {found}",
            expected="finite numbers",
            mend=f"{kept}; resume with a learning rate below {self.settings.learning_rate:g}",
        )

    def _rate(self) -> float:
        rise = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        fall = max(0.0, (self.progress() - 1) / self.settings.decay + 1)
        return self.settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * fall))

    def _log(self, numbers: Mapping[str, float]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"step": self.step, "minutes": round(self.seconds / 60, 3)}
        line |= {name: float(f"{value:.5g}") for name, value in numbers.items()}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _load(self) -> None:
        from ..models.files import read_safetensors

        path = self.folder / STATE_FILE
        tensors, metadata = read_safetensors(path)
        network = {name[8:]: value for name, value in tensors.items() if name.startswith("network.")}
        expected = {name: tuple(value.shape) for name, value in self.network.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in network.items()}
        if expected != found or "step" not in metadata:
            different = sorted(set(expected.items()) ^ set(found.items()))[:3]
            raise UserError(
                f"{path} is not a state of this network (first differences: {different})",
                expected="the state of a run with the same network",
                mend="train into another folder, or use the settings that the state was made with",
            )
        trained_on = metadata.get("data", "")
        if self.data and trained_on and trained_on != self.data:
            raise UserError(
                f"{path} was trained on other data: other pictures, or latents or texts as another network encoded them",
                expected="the state of a run on what is now given",
                mend="give another folder for the runs, or delete the file to train anew",
            )
        self._check_fixed(path, metadata.get("settings", ""))
        self.data = self.data or trained_on
        try:
            self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            for name, average in self.ema.items():
                if tensors[f"ema.{name}"].shape != average.shape:
                    raise ValueError(f"ema.{name} of shape {tuple(tensors[f'ema.{name}'].shape)}")
                average.copy_(tensors[f"ema.{name}"])
            if self.step < 0 or not 0 <= self.seconds < math.inf or not all(map(_finite, tensors.values())):
                raise ValueError("a number out of its range")
            self.optimizer.load({name[10:]: value for name, value in tensors.items() if name.startswith("optimizer.")})
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} lacks a part of a run's state, or has it in another shape: {error}",
                expected="the state of this run, whole",
                mend="delete the file to train anew, or give another folder for the runs",
            ) from error
        self.network.load_state_dict(network)

    def _check_fixed(self, path: Path, written: str) -> None:
        """Refuse a state whose run was trained otherwise; what it does not tell is taken for the same."""
        try:
            before = json.loads(written)
        except ValueError:
            return
        for name, value in self.fixed.items():
            if isinstance(before, dict) and before.get(name, value) != value:
                raise UserError(
                    f"{path} was trained with {name} = {shown(before[name])}, and {shown(value)} is asked for now",
                    expected="the settings that the run was begun with (steps, minutes and learning rate may change)",
                    mend="give another folder for the runs, or the former value",
                )


class _StopFlag:
    """Turns SIGINT and SIGTERM into a flag for the duration of a ``with`` block (main thread only)."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, object] = {}

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> _StopFlag:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: the caller's own way of stopping applies
            self._previous.clear()
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends on the run's seed and the step alone."""
    mixed = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return mixed


def batch_indices(step: int, *, batch: int, total: int, seed: int) -> Tensor:
    """The sample numbers of one step's batch, (batch,) int64: every epoch is a fresh permutation of ``total``."""
    wanted = torch.arange(step * batch, (step + 1) * batch)
    epochs = wanted // total
    orders = {
        int(epoch): torch.randperm(total, generator=step_generator(seed + 7919, int(epoch)))
        for epoch in epochs.unique()
    }
    return torch.stack([orders[int(e)][int(k % total)] for e, k in zip(epochs, wanted, strict=True)])
