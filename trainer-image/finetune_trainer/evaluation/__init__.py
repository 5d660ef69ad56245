"""Metrics of a trained model: token metrics, multiple choice, text metrics, metrics by a judge model, and the files that contain them.

The modules contain functions and small classes. The modules of this package use neither the storage nor other processes of the pod.
"""
