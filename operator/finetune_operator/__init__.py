"""The control loop: from a FineTuneJob to Jobs, and from what the pods say back to its status."""
