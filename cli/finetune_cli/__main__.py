"""`python -m finetune_cli`."""

from finetune_cli.start import main

main()
