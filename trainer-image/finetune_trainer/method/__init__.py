"""Which parameters are trained: one module for each family of methods, and `registry`, which finds the one that a run asks for."""
