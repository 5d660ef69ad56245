"""The memory plan: peak memory of a training step on each rank, computed without weights, without torch and without a GPU.

`replay.py` replays a training step: it allocates and frees what torch would allocate and free, in the same order, but only counts bytes. The
layers in `layers.py` follow the operations of transformers' layers. `plan.py` adds what only a GPU has, and an upper bound.
"""
