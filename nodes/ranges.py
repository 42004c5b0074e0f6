"""The ranges of numbers, for values that come over a link: ComfyUI checks only those that are typed into a node."""

from __future__ import annotations

from typing import Any

from ..latent_guidance.errors import UserError, shown


def check_ranges(node: Any, **given: Any) -> None:
    """Refuse numbers outside the range that the node declares for its inputs.

    Args:
        node: an instance or class of a node.
        given: values by input name; those that have no range, or that the node does not know, are left alone.

    Raises:
        UserError: naming the input, what it may be and what was found.
    """
    inputs: dict[str, Any] = {}
    for group in node.INPUT_TYPES().values():
        inputs |= group
    for name, value in given.items():
        kind, *more = inputs.get(name, ("",))
        if kind not in ("INT", "FLOAT"):
            continue
        least, most = more[0]["min"], more[0]["max"]
        numbers = int if kind == "INT" else (int, float)
        if (
            isinstance(value, bool) or not isinstance(value, numbers) or not least <= value <= most
        ):  # nan is in no range
            what = "a whole number" if kind == "INT" else "a number"
            raise UserError(
                f"{name} of {node.DISPLAY_NAME} is {shown(value)}",
                expected=f"{what} from {least:g} to {most:g}" if most < 1e6 else f"{what} from {least} to {most}",
                mend="give a value in this range over the link, or type one in",
            )
