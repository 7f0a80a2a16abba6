"""The `dreamenv` command. It imports what a subcommand needs only when that is asked for, so help comes at once."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "demo": "Film all embedded games beside their dreams, or film and measure one; on held-out levels, headless.",
    "play": "Play the dream and the real game side by side; H in the window shows the keys.",
    "view": "Look through a dataset's episodes: arrows, SPACE plays, HOME and END jump, the mouse scrubs.",
    "compare": "Measure a bundle against the real game on held-out levels; the last line printed is JSON.",
    "generate": "Dream clips of any bundle and write them as films, a dataset or a picture; needs no real game.",
    "bench": "Measure frames/s of one dream and of many, and peak memory; the last line printed is JSON.",
    "info": "Verify a bundle and print what it is, where it comes from and how faithful it was measured to be.",
}
"""Subcommands, and the first line of each one's help."""


def usage() -> str:
    """What `dreamenv --help` prints."""
    lines = [f"  {name:9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dreamenv COMMAND [OPTIONS]",
            "",
            "A learned simulator of Procgen that is a Gymnasium environment.",
            "",
            *lines,
            "",
            "`dreamenv COMMAND --help` shows its options.",
        ]
    )


def main() -> None:
    """Entry point of the console script."""
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(importlib.import_module("dreamenv").__version__)
        return
    if name not in COMMANDS:
        print(f"error: command {name!r}: there are {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    console = importlib.import_module("dreamenv.console")
    with console.errors_in_one_line():
        command = getattr(importlib.import_module("dreamenv.commands"), name)
        importlib.import_module("tyro").cli(command, prog=f"dreamenv {name}", args=rest)


if __name__ == "__main__":
    main()
