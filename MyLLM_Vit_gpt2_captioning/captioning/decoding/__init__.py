"""From an image to its caption: greedy search, sampling and beam search, their fast paths, and attention maps."""
