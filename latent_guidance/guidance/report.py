"""A run's report: at every call sigma, w, the sizes of Δ and of what each rule changed, and what rules noted; as rows and as JSON.

A sampler that calls twice a step, such as Heun, has two rows for that step. Values are kept for each sample of the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .record import Call, Record

UNIT = "root mean square over a sample's latent, in the denoised estimate"

RUNS = 64
"""How many runs are kept to be asked for by their latents; older ones are let go."""


_HALVES = (torch.float16, torch.bfloat16)


def _numbers(values: Tensor) -> list[float | None]:
    """(B,) with six digits; None for what is not a number."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _row(record: Record, number: int, call: Call) -> dict[str, Any]:
    known = {name: _numbers(size) for name, size in call.contributions.items()}
    return {
        "call": number,
        "step": call.index,
        "sigma": _numbers(call.sigma),
        "guidance_scale": _numbers(call.guidance_scale),
        "branches": [record.labels.get(name, name) for name in call.branches],
        "passes": record.passes(call),
        "delta": None if call.delta is None else _numbers(call.delta),
        "contributions": {name: known[name] for name in (*record.rules, *known) if name in known},
        "notes": {rule: {name: _numbers(value) for name, value in found.items()} for rule, found in call.notes.items()},
        "denoised": None if call.denoised is None else _numbers(call.denoised),
    }


@dataclass(frozen=True)
class Chain:
    """One chain of rules of a run.

    Attributes:
        on: "guider"; "model" for rules on a model under a guider of ComfyUI's; or "sampler" for rules inside its steps.
        rules: display names, in the order of the chain.
        rows: one a call, in order; each holds ``call`` and ``step`` (numbers from 0; step None if unknown), ``sigma``,
            ``guidance_scale``, ``delta``, ``denoised`` (lists with a number per sample; delta None where it was not made),
            ``branches`` (names of the estimates made), ``passes`` (of the network; None if the guider's are not known),
            ``contributions`` (rule -> list) and ``notes`` (rule -> name -> list). Sizes are root mean squares in the denoised
            estimate; None stands for a number that cannot be known.
    """

    on: str
    rules: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def passes(self) -> int | None:
        """Network passes of the whole run; None if the guider's are not known."""
        return sum(row["passes"] for row in self.rows) if self.on == "guider" else None


@dataclass(frozen=True)
class Report:
    """What guided one run: mostly one chain; more if rules were in a guider and on its model (in ComfyUI) or in the sampler."""

    chains: tuple[Chain, ...]

    @classmethod
    def of(cls, *records: Record) -> Report:
        """The report of finished records of one run."""
        return cls(
            tuple(
                Chain(record.on, record.rules, tuple(_row(record, i, call) for i, call in enumerate(record.calls)))
                for record in records
            )
        )

    def to_json(self) -> str:
        """The report as JSON text, a row a line."""
        chains = []
        for chain in self.chains:
            head = json.dumps({"on": chain.on, "rules": chain.rules, "passes": chain.passes}, ensure_ascii=False)
            rows = ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in chain.rows)
            chains.append(f'  {head[:-1]}, "rows": [\n{rows}\n  ]}}')
        return f'{{"unit": "{UNIT}", "chains": [\n' + ",\n".join(chains) + "\n]}\n"

    def write(self, path: Path) -> None:
        """Write :meth:`to_json` to ``path``, under a temporary name first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial.{path.name}")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)


def _fingerprint(samples: Tensor) -> str:
    """Equal for equal latents, on any device."""
    values = samples.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


def _fingerprints(samples: Tensor) -> dict[torch.dtype, str]:
    """That of latents as they are, and those of what is left of them where a program keeps its latents in half precision."""
    return {torch.float32: _fingerprint(samples)} | {kind: _fingerprint(samples.to(kind)) for kind in _HALVES}


class Reports:
    """The records of the last runs, found by the latents that a run ended in.

    In a node graph a report exists only after sampling, and whoever asks for it has the sampled latents: they say which run is
    meant, even if one guider served several samplers, or if the sampler's answer comes out of a cache.
    """

    def __init__(self, runs: int = RUNS) -> None:
        self._runs: deque[tuple[weakref.ref[Tensor], dict[torch.dtype, str], list[Record]]] = deque(maxlen=runs)

    def keep(self, samples: Tensor, record: Record) -> None:
        """Keep ``record`` of the run that ended in ``samples`` (B, ...); a second record of the same run joins the first."""
        record.settle()
        if self._runs and self._runs[-1][0]() is samples:
            self._runs[-1][2].append(record)
        else:
            self._runs.append((weakref.ref(samples), _fingerprints(samples), [record]))

    def find(self, samples: Any) -> Report:
        """The report of the run that ended in ``samples`` (B, ...): in this very tensor, else the last one in an equal one.

        Raises:
            UserError: no run that kept a report ended in it.
        """
        runs = list(reversed(self._runs)) if isinstance(samples, Tensor) else []
        mine = [records for tensor, _, records in runs if tensor() is samples]
        if not mine and runs:
            wanted, kind = _fingerprint(samples), samples.dtype if samples.dtype in _HALVES else torch.float32
            mine = [records for _, fingerprints, records in runs if fingerprints[kind] == wanted]
        if not mine:
            raise UserError(
                "a latent that no run with a report ended in",
                expected="the sampler's output as it is, of a Guider or of Apply Guidance to Model with 'report' switched on",
                mend="switch 'report' on in Guider (or Apply Guidance to Model), and connect the sampler's output directly: not "
                "denoised_output, and no latent that another node has changed",
            )
        return Report.of(*mine[0])


REPORTS = Reports()
"""Those of this process."""


def last_report(records: Sequence[Record]) -> Report:
    """The report of the last of ``records``.

    Raises:
        UserError: there is none.
    """
    if not records or not records[-1].calls:
        raise UserError(
            "a guider that has kept no report",
            expected="one made with report=True that has been sampled with",
            mend="make it with Guider(..., report=True), sample, then ask for its report",
        )
    return Report.of(records[-1])
