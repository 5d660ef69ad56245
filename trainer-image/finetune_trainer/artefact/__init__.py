"""Writes the files next to the weights of the final model or adapter: generation settings with the trained end tokens, and the model card."""
