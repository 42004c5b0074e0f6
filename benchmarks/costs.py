"""What things cost, as ratios measured in one run.

    python benchmarks/costs.py [CHECKPOINT FOLDER]

Times on shared machines are noisy: each ratio is the median of paired measurements, its two sides taken in turn.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratio(
    measured: Callable[[], object], against: Callable[[], object], *, pairs: int = 30
) -> tuple[float, float, float]:
    """(median of the paired ratios, median seconds of each side)."""
    measured(), against()  # warm up
    sides = [(seconds(measured), seconds(against)) for _ in range(pairs)]
    return (
        statistics.median(a / b for a, b in sides),
        statistics.median(a for a, _ in sides),
        statistics.median(b for _, b in sides),
    )


def fresh_process(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def line(what: str, measured: tuple[float, float, float], target: float) -> None:
    median, a, b = measured
    print(f"{what}: {median:.3f} (target {target:g}; {a * 1e3:.1f} ms against {b * 1e3:.1f} ms)")


def main() -> None:
    from latent_guidance.guidance import CFG, ClassifierGuidance, Guider
    from latent_guidance.models.checkpoint import emoji_folder, load_checkpoint
    from latent_guidance.models.unet import network_denoiser

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else emoji_folder()
    if folder is None:
        sys.exit("no emoji checkpoint beside the library; give a checkpoint folder")
    checkpoint = load_checkpoint(folder)
    assert checkpoint.classifier is not None
    denoiser = network_denoiser(checkpoint.unet, checkpoint.scheduler_config)
    cond, uncond = (checkpoint.text_encoder.encode(text)[0] for text in ("red heart", ""))
    x, sigma = torch.randn(1, 4, 16, 16) * 2, torch.tensor([2.0])
    label = checkpoint.classifier.config.labels[0]
    rule = ClassifierGuidance(scaling="raw", classifier=checkpoint.classifier, label=label)
    cfg = CFG(guidance_scale=4.0)
    both = torch.cat([uncond, cond])

    with torch.inference_mode():
        step = lambda: denoiser(torch.cat([x, x]), sigma.repeat(2), both)  # noqa: E731
        gradient = lambda: rule.gradient(denoiser.process, x, sigma, 0)  # noqa: E731
        line("classifier forward and input gradient / network call (CFG, batch of two)", ratio(gradient, step), 0.2)
        plain, guided = Guider(denoiser, [cfg], uncond=uncond), Guider(denoiser, [cfg, rule], uncond=uncond)
        line("Guider with CFG / the bare batch of two", ratio(lambda: plain(x, sigma, cond), step), 1.02)
        line(
            "Guider with CFG and classifier / with CFG",
            ratio(lambda: guided(x, sigma, cond), lambda: plain(x, sigma, cond)),
            1.25,
        )

    everything = "import latent_guidance, latent_guidance.guidance, latent_guidance.samplers"
    line(
        "import latent_guidance / import torch",
        ratio(fresh_process(everything), fresh_process("import torch"), pairs=5),
        1.3,
    )

    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "latent_guidance", "run", "workflows/quickstart.json", "--output", output]
        runs = [seconds(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True)) for _ in range(3)]
    print(f"latent-guidance run workflows/quickstart.json: {min(runs):.1f} s process start to PNG (target 20 s)")


if __name__ == "__main__":
    main()
