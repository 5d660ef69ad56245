"""The control loop. It creates the Jobs of each FineTuneJob and writes the progress of their pods to the FineTuneJob's status."""
