"""Pure functions that build the objects of one attempt from an accepted spec. The golden files in tests/unit/operator show examples."""
