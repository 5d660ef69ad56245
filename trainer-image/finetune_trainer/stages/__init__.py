"""The stages after training. Each stage runs in a separate process, after the model is committed."""
