"""One module per command: a function with the options. It imports other modules when it is called, so that `--help` stays fast."""
