"""Sends the values of a run to experiment trackers, in a process of its own (`finetune-trainer track`)."""
