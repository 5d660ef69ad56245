"""The control loop. The operator creates the Jobs of each FineTuneJob, and writes the progress of the Jobs' pods to the FineTuneJob's status."""
