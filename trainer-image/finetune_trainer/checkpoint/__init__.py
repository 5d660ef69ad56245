"""Saves checkpoints in storage with atomic commits, and restores them with verification.

`manifest` defines the contents of a checkpoint, `tree` commits and finds them in storage, `uploader` uploads them in the
background, `restore` downloads the newest valid checkpoint, `retention` chooses the checkpoints to remove, and `address` parses
the URI of a job, a checkpoint or a model. `rank`, `stop`, `window` and `rates` run in the ranks.
"""
