"""The memory plan: peak memory of a training step on each rank, computed without weights, without torch and without a GPU.

`replay.py` replays a training step: it counts the bytes that torch would allocate and free, in the same order. The layers in `layers.py` run
the same operations as transformers' layers. `plan.py` adds the memory that only a GPU needs (CUDA context, workspaces, fragmentation), and
computes an upper bound.
"""
