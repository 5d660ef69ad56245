"""Saves checkpoints in storage with atomic commits, and restores them with verification.

`manifest` defines the contents of a checkpoint, `tree` commits and finds checkpoints in storage, `uploader` uploads checkpoints in the background,
`restore` downloads the newest valid checkpoint, `retention` chooses the checkpoints to remove, and `address` parses the URI of a job, a checkpoint or
a model. The modules `rank`, `background`, `space`, `stop`, `window` and `rates` run in the processes of the ranks.
"""
