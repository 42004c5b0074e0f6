"""``python -m latent_guidance.evaluation judge | classes | prompts | captions | curves | pages | all | report | rules | rules-report``.

Every measuring command writes OUT/<command>.json, and does nothing where that is there already with the same settings.
`report` turns the folder into a picture and a page of Markdown; it alone needs matplotlib. `rules` measures every guidance rule, each
into a file of OUT/rules, and `rules-report` makes a page and a picture of them; neither is a part of `all` and `report`.
"""

from __future__ import annotations

from pathlib import Path

from ..command_line import run_commands
from .commands import PARTS, RULES_HELP, RULES_REPORT_HELP, command, rules_command


def _report(out: Path, docs: Path = Path("docs")) -> None:
    import typer

    from .report import write_report

    for path in write_report(out, docs):
        typer.echo(str(path))


def _rules_report(out: Path, docs: Path = Path("docs"), recommended: Path | None = None) -> None:
    import typer

    from .rules_page import write_rules_page

    for path in write_rules_page(out, docs, recommended):
        typer.echo(str(path))


def main() -> None:
    """Run the command line; bad input ends with exit status 2 and its message alone."""
    import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True)
    for name, (_, text) in PARTS.items():
        app.command(name, help=text)(command((name,)))
    app.command("all", help="Measure every part.")(command(tuple(PARTS)))
    app.command(
        "report",
        help="Draw DOCS/emoji_curves.png and DOCS/emoji_captions.jpg and write DOCS/EMOJI.md from the parts in OUT.",
    )(_report)
    app.command("rules", help=RULES_HELP)(rules_command())
    app.command("rules-report", help=RULES_REPORT_HELP)(_rules_report)
    run_commands(app)


if __name__ == "__main__":
    main()
