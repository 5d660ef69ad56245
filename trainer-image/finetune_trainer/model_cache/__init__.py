"""Manages the cache of base models: a folder on a volume that several pods share. `supervisor.cache_pod` is the program that fills the cache.

The module `folder` manages the folders and locks. `content` verifies files. `record` describes the file that the init container writes for the
trainer container of the same pod. If the cache fails, the pod downloads the model without the cache.
"""
