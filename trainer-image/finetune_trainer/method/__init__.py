"""Training methods: each decides which parameters are trained. `registry` returns the method of a run."""
