"""Runs benchmarks after training: tasks of the lm-evaluation-harness, domain files, rating sheets and generated code.

Before training, the supervisor checks the folders of the benchmarks with the module `plan`. Only the module `harness` imports large libraries.
"""
