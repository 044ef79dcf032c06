"""Parts of the captioner that the script wires together, and its files: encoders, tokenizer, checkpoints, loss."""
