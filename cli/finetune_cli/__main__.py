"""`python -m finetune_cli`."""

from finetune_cli.entrypoint import main

main()
