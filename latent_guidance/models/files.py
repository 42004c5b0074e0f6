"""Reading and writing the files of a checkpoint: JSON configs and safetensors, nothing pickled, nothing half written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, shown

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that can run code when they are loaded."""
MAX_JSON_BYTES = 16 * 2**20
"""A larger config or vocabulary is refused unread."""
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")


def refuse_pickle(path: Path) -> None:
    """Raise a UserError that names the file if its ending says that it is pickled."""
    if path.suffix.lower() in PICKLED:
        raise UserError(
            f"{path} holds pickled weights ({path.suffix}), which can run any code when opened",
            expected="a .safetensors file",
            mend="convert it where you trust it (safetensors.torch.save_file), or get the safetensors version",
        )


def component_folder(path: Path | str, component: str) -> Path:
    """The folder of one network: ``path`` itself, or ``path/component`` where ``path`` is a checkpoint folder.

    Raises:
        UserError: The folder does not exist or holds no such component.
    """
    path = Path(path)
    refuse_pickle(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder" if path.exists() else f"{path} was not found",
            expected=f"a checkpoint folder, or its {component}/ folder",
            mend="check the path; names are those of the folders in models/latent_guidance",
        )
    inner = path / component
    if inner.is_dir():
        return inner
    if (path / "config.json").is_file():
        return path
    raise UserError(
        f"{path} holds {_listing(path)} but no {component}/",
        expected=f"a checkpoint folder with {component}/config.json, or that folder itself",
        mend=f"give a checkpoint that has a {component}, or another folder",
    )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        UserError: The file is missing, unreadable, larger than 16 MB, or not a JSON object.
    """
    if not path.is_file():
        raise UserError(
            f"{path} was not found",
            expected=f"a component folder in the diffusers layout, with {path.name} in it",
            mend="copy the whole folder again",
        )
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error})",
            expected="a file that may be read",
            mend="correct its permissions, or copy it again",
        ) from error
    if len(text) > MAX_JSON_BYTES:
        raise UserError(
            f"{path} is larger than {MAX_JSON_BYTES // 2**20} MB",
            expected="a JSON file of a checkpoint, some kilobytes long",
            mend="copy the file again",
        )
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of too many digits, or brackets too deep
        raise UserError(
            f"{path} is not JSON that can be read ({error})", expected="a JSON object", mend="copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}", expected="a JSON object", mend="copy it again")
    return value


def weights_file(folder: Path) -> Path:
    """The safetensors file of a component folder.

    Raises:
        UserError: There is none; pickled ones are named, not opened.
    """
    for stem in WEIGHT_NAMES:
        for ending in (".safetensors", ".fp16.safetensors"):
            if (found := folder / f"{stem}{ending}").is_file():
                return found
    for path in sorted(folder.iterdir()):
        refuse_pickle(path)
    raise UserError(
        f"{folder} holds {_listing(folder)} but no weights",
        expected="diffusion_pytorch_model.safetensors or model.safetensors",
        mend="copy the whole folder again",
    )


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names, shapes and metadata of a safetensors file, as tensors without memory (floating-point ones are float32).

    Raises:
        UserError: The file is missing, pickled, or damaged.
    """
    with _opened(path) as file:
        shapes: dict[str, Tensor] = {}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            entry = file.get_slice(name)
            dtype = torch.float32 if str(entry.get_dtype()).startswith(("F", "BF")) else torch.int64
            shapes[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
        return shapes, dict(file.metadata() or {})


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU in the file's own types.

    Raises:
        UserError: The file is missing, pickled, or damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    if not path.is_file():
        raise UserError(f"{path} was not found", expected="a .safetensors file", mend="check the path")
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error})",
            expected="a whole safetensors file",
            mend="download or copy it again",
        ) from error


def check_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, path: Path, what: str) -> None:
    """Refuse tensors of which any name, shape or kind of number is not the module's; values are not looked at.

    Args:
        module: Whose weights they should be.
        tensors: As read from ``path``, or its header.
        path: Named in the error.
        what: What the module is, such as "UNet"; named in the error.

    Raises:
        UserError: A name is missing or surplus, a shape differs, or weights are whole numbers; the first few are listed.
    """
    own = module.state_dict()
    expected = {name: tuple(value.shape) for name, value in own.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    shared = sorted(expected.keys() & found.keys())
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors such as {missing[0]!r}")
    if surplus:
        parts.append(f"has {len(surplus)} others such as {shown(surplus[0])}")
    if different := [name for name in shared if expected[name] != found[name]]:
        first = different[0]
        parts.append(f"has {first!r} of shape {found[first]} where the config asks for {expected[first]}")
    if whole := [n for n in shared if own[n].is_floating_point() and not tensors[n].is_floating_point()]:
        parts.append(f"has {whole[0]!r} in whole numbers, not in floating point")
    if parts:
        raise UserError(
            f"{path} does not hold this {what}: it {', '.join(parts)}",
            expected=f"the weights that belong to the {what} config.json beside them",
            mend="use the config and the weights of one and the same checkpoint",
        )


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, path: Path, what: str) -> None:
    """Copy tensors into a module; every name and shape must match, and every value be finite.

    Args:
        module: Receives the values, cast to its own types.
        tensors: As read from ``path``.
        path: Named in the error.
        what: What the module is, such as "UNet"; named in the error.

    Raises:
        UserError: From :func:`check_weights`, or a weight is NaN or infinite, or becomes so in the module's type.
    """
    check_weights(module, tensors, path=path, what=what)
    own = module.state_dict()
    for name, value in tensors.items():
        if not _finite(value.to(own[name].dtype)):
            raise UserError(
                f"{path} holds NaN or infinity in {name!r}, a weight of this {what}",
                expected="finite weights",
                mend="copy the file again, or use an earlier one: its training went wrong",
            )
    module.load_state_dict(dict(tensors))


def _finite(value: Tensor) -> bool:
    """Whether all values are finite; their sum says so at once, unless it overflows."""
    wide = value if value.dtype == torch.float64 else value.float()
    return bool(torch.isfinite(wide.sum())) or bool(torch.isfinite(wide).all())


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (floating-point ones as ``dtype``) under a temporary name, then rename the file.

    Raises:
        UserError: A finite number is too large for ``dtype``; nothing is written.
    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    converted = {
        name: (value.detach().cpu().to(dtype) if value.is_floating_point() else value.cpu()).contiguous()
        for name, value in tensors.items()
    }
    for name, value in converted.items():
        if not _finite(value) and _finite(tensors[name]):
            raise UserError(
                f"{name} has a number that {dtype} cannot hold, {float(tensors[name].detach().abs().max()):.4g}",
                expected=f"numbers up to {torch.finfo(dtype).max:.4g}",
                mend=f"train with a lower learning rate; {path} was not written",
            )
    partial.write_bytes(save(converted, {"format": "pt", **(metadata or {})}))
    os.replace(partial, path)


def _listing(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "") if names else "nothing"
