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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from ..errors import UserError
from .optimizers import TrainingOptimizer

StepLoss = Callable[[int, torch.Generator], tuple[Tensor, Mapping[str, float]]]
"""(step, generator of that step) -> (scalar loss, named numbers for the log)."""

STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, and how often to save.

    Attributes:
        steps: Number of optimiser steps, >= 1.
        learning_rate: Peak learning rate, > 0.
        warmup: Steps of linear rise before the peak.
        decay: The share of the run, in (0, 1], at whose end the rate falls from the peak to nothing along a cosine. Less
            than 1 suits a long run that is looked at on the way: the averaged weights of the level part are usable.
        weight_decay: Decoupled decay.
        muon: Matrices are moved by Muon, see :mod:`.optimizers`; without it everything is AdamW's.
        clip: Largest gradient norm.
        ema_decay: Decay of the averaged weights, in [0, 1).
        seed: Seed of everything random in the run.
        minutes: Stop (with the learning rate at nothing) after this much training time even if steps remain; None
            for no limit. A run that a time limit ended is not reproducible step for step.
        save_minutes: Time between saved states.
        log_every: Steps between log lines.
        device: "cpu" or "cuda". Random numbers are drawn on the CPU either way.
        bf16: Compute in bfloat16 (weights stay float32).
        compile: Compile the forward and backward pass first (needs a C++ compiler): one or two minutes, then a fifth less
            time a step on the CPU.
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


class TrainingRun:
    """One network, its average, its optimiser and its folder.

    Args:
        network: What is trained; several networks go into one ``nn.ModuleDict``.
        folder: Where the state is kept; an existing state is resumed.
        settings: See :class:`LoopSettings`.
        data: A mark of what it is trained on. A state that was trained on other data is refused; one without a mark is taken, as is
            any if this is empty.

    Raises:
        UserError: The folder holds the state of another network, or of a run on other data.
    """

    def __init__(self, network: nn.Module, folder: Path, settings: LoopSettings, *, data: str = "") -> None:
        on_gpu = settings.device != "cpu"
        self.network = network.to(settings.device)
        if on_gpu and not settings.muon:  # convolutions on tensor cores read channels last
            network.to(memory_format=torch.channels_last)
        self.folder = Path(folder)
        self.settings = settings
        self.data = data
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
        """Write the state under a temporary name, then rename it."""
        from ..models.files import write_safetensors

        tensors = {f"network.{name}": value.detach() for name, value in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        metadata = {
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "settings": json.dumps(asdict(self.settings)),
            "data": self.data,
        }
        write_safetensors(self.folder / STATE_FILE, tensors, dtype=torch.float32, metadata=metadata)

    def _one_step(self, loss_of: StepLoss) -> dict[str, float]:
        loss, shown = loss_of(self.step, step_generator(self.settings.seed, self.step))
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            saved = self.folder / STATE_FILE
            kept = f"the last good state is {saved}" if saved.is_file() else "no state was saved yet"
            raise UserError(
                f"Training stopped at step {self.step}: loss {float(loss.detach()):.4g}, gradient norm {float(norm):.4g}",
                expected="finite numbers",
                mend=f"{kept}; resume with a learning rate below {self.settings.learning_rate:g}",
            )
        self.optimizer.step(self._rate())
        self.step += 1
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
        return {"loss": float(loss.detach()), **shown, "grad_norm": float(norm)}

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
        from safetensors import safe_open

        path = self.folder / STATE_FILE
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
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
        self.data = self.data or trained_on
        self.network.load_state_dict(network)
        self.step = int(metadata["step"])
        self.seconds = float(metadata["seconds"])
        for name in self.parameters:
            self.ema[name].copy_(tensors[f"ema.{name}"])
        self.optimizer.load({name[10:]: value for name, value in tensors.items() if name.startswith("optimizer.")})


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
