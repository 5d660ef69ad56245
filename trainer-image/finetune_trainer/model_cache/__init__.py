"""The cache of base models: a folder on a volume that several pods share. `supervisor.cache_pod` is the program that fills it.

`folder` has the folders and locks, `content` verifies files, `record` is what the init container with the cache tells the trainer
container of the same pod. Everything that fails in the cache only leads to a download without the cache.
"""
