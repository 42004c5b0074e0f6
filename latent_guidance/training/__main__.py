"""``python -m latent_guidance.training emoji | vae | decoder | classifier | unet | clip``: the recipes as commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from . import recipes


def _echoing(recipe: Callable[..., Any], name: str) -> Callable[..., None]:
    import functools

    import typer

    @functools.wraps(recipe)
    def command(*args: Any, **kwargs: Any) -> None:
        result = recipe(*args, **kwargs)
        if isinstance(result, dict):
            for level, found in result.items():
                shares = found if isinstance(found, dict) else {"accuracy": found}
                numbers = ", ".join(f"{what} {share:.3f}" for what, share in shares.items())
                typer.echo(f"log-SNR {level:+.1f}: {numbers} on held-out pictures")
        elif result is not None:
            typer.echo(f"{name}: {result}")

    command.__annotations__ = {**recipe.__annotations__, "return": None}
    return command


def main() -> None:
    """Run the command line; bad input ends with exit status 2 and its message alone."""
    import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True)
    commands: dict[str, Callable[..., Any]] = {
        "emoji": recipes.make_emoji,
        "vae": recipes.train_vae,
        "decoder": recipes.settle_decoder,
        "classifier": recipes.train_classifier,
        "unet": recipes.train_unet,
        "clip": recipes.train_clip,
    }
    for name, recipe in commands.items():
        app.command(name)(_echoing(recipe, name))
    try:
        app()
    except UserError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
