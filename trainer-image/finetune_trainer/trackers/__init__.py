"""Sends the values of a run to experiment trackers, in a separate process (`finetune-trainer track`)."""
