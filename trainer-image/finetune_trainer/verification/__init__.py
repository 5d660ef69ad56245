"""Verifies that the stored model computes what the trained model computed in memory.

The trainer writes reference values at the end of training (module `record`). The stage `verifying` loads the stored model in a fresh process
without the trainer's own loaders, computes the same values, and compares them (module `compare`). Before the stage loads the model, the module
`artefact_checks` finds faults in the files that servers and libraries would silently ignore.
"""
