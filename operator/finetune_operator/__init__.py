"""The control loop: creates Jobs for each FineTuneJob, and writes the progress of their pods to its status."""
