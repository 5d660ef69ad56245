"""One module per command. The function of a command imports other modules inside its body, so that `--help` does not load them."""
