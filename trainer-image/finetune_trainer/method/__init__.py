"""The training methods. A method decides which parameters are trained. `registry` creates the method of a run."""
