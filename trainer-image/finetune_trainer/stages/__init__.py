"""Runs the stages after training. After the final model is committed, each stage runs in a process of its own."""
