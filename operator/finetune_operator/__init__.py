"""The control loop: creates Jobs for each FineTuneJob, and writes the progress of their pods to the status of the FineTuneJob."""
