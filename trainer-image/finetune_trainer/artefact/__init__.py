"""Writes the model card, and the generation settings with the trained end tokens. Both are stored next to the weights of the final model or adapter."""
