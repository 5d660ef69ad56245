"""From an accepted spec to the objects of one attempt. Pure, with golden files."""
