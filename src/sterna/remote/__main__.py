"""`python -m sterna.remote` is the `sterna-remote` command."""

from sterna.remote.app import main

main()
