"""One module a command: a thin function with its options, which imports what it needs when it is called."""
