"""Benchmarks after training: tasks of the lm-evaluation-harness, domain files, rating sheets and generated code.

The supervisor checks the folders of the benchmarks before training with `plan`. Only `harness` imports large libraries.
"""
