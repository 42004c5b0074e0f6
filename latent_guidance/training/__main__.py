"""``python -m latent_guidance.training emoji | vae | decoder | classifier | unet | clip``: the recipes as commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from ..command_line import run_commands
from . import recipes

COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "emoji": (recipes.make_emoji, "Draw the emoji pictures that the bundled model learns from, at 128 and 160 pixels."),
    "vae": (recipes.train_vae, "Train the VAE: the first thing a checkpoint needs. Prints its mean PSNR in dB."),
    "decoder": (
        recipes.settle_decoder,
        "Train the decoder of a VAE further, on whole pictures. Prints the mean PSNR in dB.",
    ),
    "classifier": (
        recipes.train_classifier,
        "Train a classifier of noisy latents. Prints its accuracy on held-out pictures at several noise levels.",
    ),
    "unet": (recipes.train_unet, "Train UNet and text encoder, and complete the checkpoint folder."),
    "clip": (
        recipes.train_clip,
        "Train a CLIP of noisy latents. Prints how often held-out pictures find their caption and their group.",
    ),
}
"""Command -> recipe, and what it does in a sentence."""

HELP = {
    "folder": "Where the pictures go; by default the user's cache.",
    "checkpoint": "The checkpoint folder to write to; what an earlier command put there is read.",
    "runs": "A folder for what is needed to go on after a stop: run states and encoded pictures.",
    "pictures": "The folder of pictures, with 128/ and 160/ in it; by default the emoji are drawn.",
    "steps": "How many steps to train.",
    "minutes": "Stop after so many minutes, the learning rate fallen to nothing; such a run is not repeatable bit for bit.",
    "learning_rate": "The largest learning rate.",
    "seed": "Seed of weights, order and noise.",
    "batch": "Pictures per step.",
    "jitter": "The largest standard deviation of the noise that is added to the latents, of which a sampler's are never free.",
    "crop": "Side of the crops that it learns from, in pixels.",
    "latent_space": "A name for the VAE's latents; a classifier made for one name refuses another.",
    "device": "cpu or cuda.",
    "start_from": "A checkpoint folder whose weights a new run begins with, in the place of random ones.",
    "away_from": "A checkpoint folder of a weaker stage of start_from; pushed away from it, the empty prompt draws more decidedly.",
    "sharpness": "How far it is pushed: 1 not at all, 2 as far again as the two stages lie apart.",
    "sharp_below": "The log-SNR below which it is pushed.",
    "decay": "The share of the run, up to 1, over which the learning rate falls at its end; 1 is all of it.",
    "width": "Channels of the network's second level, a multiple of 32.",
    "first": "The share of a step that is whole renders of 128 pixels, up to 1; the rest are crops of larger ones. By default a third.",
    "settling": "The share of noise levels, 0 to 1, drawn from those at which a sampler settles what it draws; the rest from all.",
    "weight_decay": "How strongly weights are drawn to nothing.",
    "muon": "Train the matrices with Muon in the place of AdamW.",
    "time_power": "How the noise levels that it learns from are spread: 1 evenly; less gives high noise more weight.",
    "drop": "The share of captions replaced by the empty prompt, 0 to 1; the other kinds share the rest as they do by default.",
    "compile": "Compile the passes first: quicker steps after a slow start.",
    "export_only": "Write the run's state as it is now, without training.",
    "by": "What the classes are: group (the folders) or subgroup (of the pictures' metadata).",
}
"""Parameter of a recipe -> its help."""


def _described(recipe: Callable[..., Any]) -> inspect.Signature:
    """The recipe's signature with each parameter's help in it."""
    import typer

    hints = get_type_hints(recipe)
    described = []
    for name, parameter in inspect.signature(recipe).parameters.items():
        kind = typer.Argument if parameter.kind is not parameter.KEYWORD_ONLY else typer.Option
        annotation = Annotated[hints[name], kind(help=HELP.get(name))]  # a name without help fails its test
        described.append(parameter.replace(annotation=annotation))
    return inspect.Signature(described)


def _command(recipe: Callable[..., Any], name: str, text: str) -> Callable[..., None]:
    import typer

    def command(*args: Any, **kwargs: Any) -> None:
        try:
            result = recipe(*args, **kwargs)
        except KeyboardInterrupt as stopped:
            typer.echo(f"\n{str(stopped) or 'stopped'}", err=True)
            raise typer.Exit(130) from None
        if isinstance(result, dict):
            for level, found in result.items():
                shares = found if isinstance(found, dict) else {"accuracy": found}
                numbers = ", ".join(f"{what} {share:.3f}" for what, share in shares.items())
                typer.echo(f"log-SNR {level:+.1f}: {numbers} on held-out pictures")
        elif result is not None:
            typer.echo(f"{name}: {result}")

    signature = _described(recipe)
    command.__doc__, command.__signature__ = text, signature  # type: ignore[attr-defined]
    command.__annotations__ = {key: parameter.annotation for key, parameter in signature.parameters.items()}
    return command


def main() -> None:
    """Run the command line; bad input ends with exit status 2 and its message alone."""
    import typer

    app = typer.Typer(
        add_completion=False, no_args_is_help=True, help="Train the networks of a checkpoint folder, one command each."
    )
    for name, (recipe, text) in COMMANDS.items():
        app.command(name)(_command(recipe, name, text))
    run_commands(app)


if __name__ == "__main__":
    main()
