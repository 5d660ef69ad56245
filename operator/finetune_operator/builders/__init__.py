"""Pure functions from an accepted spec to the objects of one attempt. Golden files show their results."""
