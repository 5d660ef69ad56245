"""One policy a module: pure functions from facts to a verdict, readable alone, with a table test beside each."""
