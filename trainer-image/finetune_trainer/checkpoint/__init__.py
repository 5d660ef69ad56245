"""Checkpoints that are never lost, never half, never wrong.

`manifest` says what a checkpoint is, `tree` finds and commits them in storage, `uploader` moves them in the background,
`restore` brings the newest good one back, `retention` removes old ones. `rank` is the part that lives in the ranks.
"""
