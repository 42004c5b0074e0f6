"""Runs inside a ComfyUI's own Python: ``inside.py COMFYUI BASE SCRIPT OUT``.

Sets ComfyUI up as its main.py does (CPU, the given base directory), loads the pack through ComfyUI's own loader, runs SCRIPT in
inference mode, as nodes run, and writes what it leaves in ``inside.result`` to OUT as JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def far(a: Any, b: Any) -> float:
    """Largest difference, relative to the spread of a."""
    return float((a - b).abs().max() / a.std())


def refused(action: Any) -> str:
    """The error that ``action`` ends in, "" if none."""
    try:
        action()
    except BaseException as error:  # an interrupt is no Exception in newer ComfyUIs
        return f"{type(error).__name__}: {error}"
    return ""


def counted(guided: Any) -> tuple[Any, list[int]]:
    """A clone of a MODEL that notes how many samples every call of the network has."""
    calls: list[int] = []
    guided = guided.clone()

    def wrapper(apply_model: Any, args: Any) -> Any:
        calls.append(len(args["input"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    guided.set_model_unet_function_wrapper(wrapper)
    return guided, calls


def main() -> None:
    comfyui, base, script, out = map(Path, sys.argv[1:5])
    sys.path[0] = str(comfyui)
    sys.path.append(str(Path(__file__).resolve().parent / "within"))
    sys.argv = ["main.py", "--cpu", "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes

    pack = base / "custom_nodes" / "latent_guidance"
    assert asyncio.run(nodes.load_custom_node(str(pack))), "ComfyUI could not load the pack"
    name = str(pack).replace(".", "_x_")

    def part(path: str) -> Any:
        """A module of the pack, such as "nodes.runtime.comfy.model"."""
        return importlib.import_module(f"{name}.{path}")

    def call(node_id: str, **inputs: Any) -> Any:
        """What a node answers."""
        cls = nodes.NODE_CLASS_MAPPINGS[node_id]
        return getattr(cls(), cls.FUNCTION)(**inputs)

    module: Any = ModuleType("inside")
    module.part, module.call, module.result = part, call, {}
    module.far, module.refused, module.counted = far, refused, counted
    sys.modules["inside"] = module
    import torch

    with torch.inference_mode():
        runpy.run_path(str(script))
    out.write_text(json.dumps(module.result), encoding="utf-8")


main()
