"""Pure functions from facts to a verdict, one policy per module."""
