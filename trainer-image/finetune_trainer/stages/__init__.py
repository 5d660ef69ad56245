"""Runs the stages after training. Each stage runs in a process of its own, after the model is committed."""
