"""`python -m dreamenv` is the `dreamenv` command."""

from dreamenv.cli import main

main()
