"""`python -m landmark`: what the command does."""

from .cli.main import main

main()
