"""One module per command. The command's function imports other modules when it is called, so that `--help` stays fast."""
