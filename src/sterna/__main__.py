"""`python -m sterna` is the `sterna` command."""

from sterna.cli.main import main

main()
