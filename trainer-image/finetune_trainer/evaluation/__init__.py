"""Metrics of a trained model: token metrics, multiple choice, text metrics, judged metrics, and the files that contain them.

The modules contain functions and small classes without access to storage, to the job's spec or to other processes.
"""
