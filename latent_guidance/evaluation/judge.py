"""The judge: a classifier of clean pictures that says which group a sample belongs to.

It looks at pixels and shares neither weights nor features with the noisy-latent classifier that steers, so that a picture which
only pleases the guide does not please it too. (Both learned from the same pictures: there are no others.) Two are trained: one
without a tenth of the pictures, to state how well it does on pictures it has not seen, and one on all pictures, which judges. Emoji
come in series, so that a picture held out often has near relatives among those seen.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from ..models.files import load_weights, read_safetensors, write_safetensors
from .augment import augmented, seen_by_judge
from .bench import Bench
from .parts import measured, read_part

SPLIT_SEED = 777
HELD_OUT_EVERY = 10
FILE = "judge.safetensors"
WIDTHS = (32, 64, 128, 192)
LEARNING_RATE, WEIGHT_DECAY, WARMUP, SMOOTHING, DROPOUT = 2e-3, 0.05, 100, 0.1, 0.2


class _Block(nn.Module):
    """Two 3 x 3 convolutions with a bypass."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(after)
        self.conv_2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(after)
        self.bypass = nn.Conv2d(before, after, 1, bias=False) if before != after else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm_1(self.conv_1(x)))
        x = functional.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        return functional.relu(self.norm_2(self.conv_2(h)) + (x if self.bypass is None else self.bypass(x)))


class Judge(nn.Module):
    """Residual network on (B, 3, size, size) pictures in [-1, 1] -> logits (B, K).

    Args:
        classes: K.
        size: Side of what it sees.
    """

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()]
        before = WIDTHS[0]
        for width in WIDTHS:
            layers += [_Block(before, width, 2), _Block(width, width, 1)]
            before = width
        self.body = nn.Sequential(*layers)
        self.drop = nn.Dropout(DROPOUT)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x).mean((2, 3))))

    @torch.no_grad()
    def verdicts(self, pictures: Tensor) -> Tensor:
        """Groups (N,) int64, on the CPU, of pictures (N, 3, H, W) uint8."""
        device = self.head.weight.device
        parts = [self(seen_by_judge(part.to(device), self.size)).argmax(1).cpu() for part in pictures.split(256)]
        return torch.cat(parts)


def held_out(total: int) -> Tensor:
    """Which of ``total`` pictures the first judge never sees, (total,) bool: one in ten, by their number alone."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
    mask = torch.zeros(total, dtype=torch.bool)
    mask[order[::HELD_OUT_EVERY]] = True
    return mask


def train_judge(
    sources: list[Tensor], classes: Tensor, *, count: int, seen: Tensor, size: int, steps: int, batch: int, seed: int,
    device: torch.device,
) -> Judge:  # fmt: skip
    """Train a judge from nothing; groups come equally often.

    Args:
        sources: The same N pictures in several renderings, each (N, 3, H, W) uint8.
        classes: (N,) int64 in [0, count).
        count: Groups.
        seen: (N,) bool; the others are left out.
        size: Side of what the judge sees.
        steps: Updates.
        batch: Pictures per update.
        seed: Of weights, order and augmentation.
        device: Where it is trained; bfloat16 arithmetic on a GPU.

    Raises:
        UserError: A group has no picture that is seen, or the loss turned NaN.
    """
    by_class = [torch.nonzero((classes == number) & seen).flatten() for number in range(count)]
    if not all(len(members) for members in by_class):
        raise UserError("a group without pictures", expected="pictures of every group", mend="give the whole set")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(count, size).to(device).train()
        generator = torch.Generator().manual_seed(seed)
        renderings = [source.to(device) for source in sources]
        optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / min(WARMUP, max(1, steps // 4)))
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        loss = torch.zeros(())
        for step in range(steps):
            labels = torch.randint(count, (batch,), generator=generator)
            picks = torch.rand(batch, generator=generator).tolist()
            chosen = torch.stack(
                [by_class[k][int(u * len(by_class[k]))] for k, u in zip(labels.tolist(), picks, strict=True)]
            )
            x = augmented(renderings[step % len(renderings)][chosen.to(device)], size, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = judge(x)
            loss = functional.cross_entropy(logits.float(), labels.to(device), label_smoothing=SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    if not math.isfinite(float(loss.detach())):
        raise UserError(
            "the judge's loss turned NaN",
            expected="a finite loss",
            mend="train it in another size or on larger batches (--judge-size, --judge-batch)",
        )
    return judge.eval().requires_grad_(False)


def accuracies(judge: Judge, pictures: Tensor, classes: Tensor, labels: tuple[str, ...]) -> dict[str, Any]:
    """Share judged right: of all pictures, per group, and the mean of the groups."""
    right = (judge.verdicts(pictures) == classes).float()
    by_group = {
        label: float(right[classes == number].mean()) if bool((classes == number).any()) else None
        for number, label in enumerate(labels)
    }
    shares = [share for share in by_group.values() if share is not None]
    return {
        "pictures": len(pictures),
        "all": float(right.mean()),
        "mean_of_groups": sum(shares) / len(shares),
        "by_group": by_group,
    }


def judge_settings(bench: Bench) -> dict[str, Any]:
    """What the judge depends on."""
    plan = bench.plan
    return {
        "vae": bench.vae_mark,
        "pictures": bench.pictures_mark,
        "steps": plan.judge_steps,
        "batch": plan.judge_batch,
        "size": plan.judge_size,
        "widths": WIDTHS,
        "split_seed": SPLIT_SEED,
    }


def measure_judge(bench: Bench) -> dict[str, Any]:
    """Train both judges, or read what was measured; ``out`` then holds the one that judges."""

    def train() -> dict[str, Any]:
        data, plan = bench.data, bench.plan
        sources = [bench.large, data.images, bench.reconstructions]
        left_out = held_out(len(data))

        def trained(seen: Tensor, seed: int) -> Judge:
            return train_judge(
                sources, data.classes, count=len(data.labels), seen=seen, size=plan.judge_size, steps=plan.judge_steps,
                batch=plan.judge_batch, seed=seed, device=bench.device,
            )  # fmt: skip

        def score(judge: Judge, chosen: Tensor) -> dict[str, Any]:
            kinds = {"real": data.images[chosen], "reconstructions": bench.reconstructions[chosen]}
            return {
                kind: accuracies(judge, pictures, data.classes[chosen], data.labels) for kind, pictures in kinds.items()
            }

        everything = torch.ones(len(data), dtype=torch.bool)
        bench.say("judge: training without the held-out tenth")
        examined = trained(~left_out, SPLIT_SEED)
        result: dict[str, Any] = {"held_out": score(examined, left_out)}
        bench.say(f"judge: {result['held_out']['real']['all']:.3f} of the held-out pictures are judged right")
        final = trained(everything, SPLIT_SEED + 1)
        result["final"] = score(final, everything)
        verdicts = final.verdicts(data.images)
        result["verdicts_on_real"] = torch.bincount(verdicts, minlength=len(data.labels)).tolist()
        metadata = {"labels": json.dumps(data.labels), "size": str(plan.judge_size)}
        write_safetensors(bench.out / FILE, final.state_dict(), dtype=torch.float32, metadata=metadata)
        parameters = sum(p.numel() for p in final.parameters())
        return {**result, "parameters": parameters, "judge": judge_mark(bench.out)}

    def whole(result: dict[str, Any]) -> bool:
        return (bench.out / FILE).is_file() and judge_mark(bench.out) == result["judge"]

    return measured(bench.out, "judge", judge_settings(bench), train, say=bench.say, whole=whole)


def judge_fits(bench: Bench) -> bool:
    """Whether ``out`` holds a judge of the bench's pictures and VAE, however long it was trained and on whatever size."""
    try:
        settings = read_part(bench.out, "judge")["settings"]
    except UserError:
        return False
    own = judge_settings(bench)
    return (bench.out / FILE).is_file() and all(settings.get(key) == own[key] for key in ("vae", "pictures"))


def judge_mark(out: Path) -> str:
    """What tells this judge from others: twelve digits of its file's SHA-256."""
    return hashlib.sha256((out / FILE).read_bytes()).hexdigest()[:12]


def load_judge(path: Path, device: torch.device | str = "cpu") -> tuple[Judge, tuple[str, ...]]:
    """The judge of a file and its labels.

    Raises:
        UserError: The file is missing or is none of :func:`measure_judge`'s.
    """
    tensors, metadata = read_safetensors(path)
    if "labels" not in metadata or "size" not in metadata:
        raise UserError(f"{path} holds no judge", expected="a file that `judge` wrote", mend="train the judge again")
    labels = tuple(json.loads(metadata["labels"]))
    judge = Judge(len(labels), int(metadata["size"]))
    load_weights(judge, tensors, path=path, what="judge")
    return judge.to(device).eval().requires_grad_(False), labels
