"""Whether a device that somebody named is there."""

from __future__ import annotations

import torch

from .errors import UserError, shown


def check_device(device: str) -> None:
    """Raise UserError unless ``device`` is "cpu", or "cuda" or "cuda:N" where torch finds such a GPU."""
    kind, colon, number = device.partition(":")
    cuda = kind == "cuda" and (number.isdecimal() if colon else True)
    there = cuda and int(number or 0) < torch.cuda.device_count()
    if device != "cpu" and not there:
        found = f"device {shown(device)}" + (
            f", and this PyTorch sees {torch.cuda.device_count()} GPUs" if cuda else ""
        )
        raise UserError(found, expected="cpu, or cuda on a machine with such a GPU", mend="use cpu")
