"""Write workflows/*.json and their API twins: ``python tools/make_workflows.py``, after changing a node or a workflow.

``--check`` writes nothing and exits with 1 if a file is not what would be written. ``--thumbnails [NAME ...]`` also runs the named
workflows, or all, and makes their .jpg from what they save; those for the user's own checkpoint get a drawing of their graph.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import workflow_checkpoints
import workflow_checkpoints_more
import workflow_gradients
import workflow_graphs
import workflow_rules
import workflow_sampling
from core_nodes import with_core_nodes
from PIL import Image
from workflow_builder import Workflow
from workflow_card import card

from latent_guidance.host.context import Host, running
from latent_guidance.host.pack import node_library
from latent_guidance.host.run import run_workflow

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
THUMBNAIL = 512
BUNDLED = workflow_graphs.GRAPHS | workflow_rules.GRAPHS | workflow_gradients.GRAPHS | workflow_sampling.GRAPHS
OWN = workflow_checkpoints.GRAPHS | workflow_checkpoints_more.GRAPHS
GRAPHS = BUNDLED | OWN
KINDS = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3"}
"""First word of a workflow's name -> the kind of checkpoint that it needs."""


def files() -> dict[Path, str]:
    """Path -> content of every workflow file."""
    written: dict[Path, str] = {}
    library = with_core_nodes(node_library())
    for name, build in GRAPHS.items():
        workflow = Workflow(name, library)
        build(workflow)
        for path, data in (
            (FOLDER / f"{name}.json", workflow.editor()),
            (FOLDER / "api" / f"{name}.json", workflow.api()),
        ):
            written[path] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    return written


def thumbnail(name: str) -> None:
    """Write a workflow's thumbnail: what it saves, in one square picture; or its graph, if it needs the user's own checkpoint."""
    if name in OWN:
        square = card(json.loads((FOLDER / f"{name}.json").read_text("utf-8")), KINDS[name.split("_")[0]])
    else:
        square = saved(name)
    partial = FOLDER / f".{name}.partial.jpg"
    square.save(partial, quality=88)
    os.replace(partial, FOLDER / f"{name}.jpg")


def saved(name: str) -> Image.Image:
    """Run a workflow; the pictures that it saves as one square, those of one size in a band of their own."""
    import numpy as np
    import torch

    from latent_guidance.evaluation.pictures import picture_grid

    with tempfile.TemporaryDirectory() as folder:
        paths = run_workflow(FOLDER / f"{name}.json", host=Host(output=Path(folder))).saved
        arrays = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in paths]
    bands = []
    for shape in dict.fromkeys(a.shape for a in arrays):
        alike = [torch.from_numpy(a)[None] for a in arrays if a.shape == shape]
        sheet = (
            picture_grid(alike, columns=len(alike) if len(alike) < len(arrays) else 0)[0]
            if len(alike) > 1
            else alike[0][0]
        )
        bands.append(Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8)))
    width = max(band.width for band in bands)
    bands = [band.resize((width, round(band.height * width / band.width)), Image.Resampling.LANCZOS) for band in bands]
    picture = Image.new("RGB", (width, sum(band.height for band in bands)), "white")
    for i, band in enumerate(bands):
        picture.paste(band, (0, sum(above.height for above in bands[:i])))
    scale = THUMBNAIL / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    square.paste(picture, ((THUMBNAIL - picture.width) // 2, (THUMBNAIL - picture.height) // 2))
    return square


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--thumbnails", nargs="*", metavar="NAME")
    options = parser.parse_args()
    unknown = set(options.thumbnails or ()) - GRAPHS.keys()
    if unknown:
        parser.error(f"no workflow {', '.join(sorted(unknown))}; there are {', '.join(GRAPHS)}")
    with running(Host()):
        written = files()
    stale = [path for path, text in written.items() if not path.is_file() or path.read_text("utf-8") != text]
    stale += sorted(path for path in FOLDER.rglob("*.*") if path.stem not in GRAPHS)
    if options.check:
        for path in stale:
            print(f"stale: {path}")
        return 1 if stale else 0
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
        print(path)
    if options.thumbnails is not None:
        for name in options.thumbnails or GRAPHS:
            thumbnail(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
