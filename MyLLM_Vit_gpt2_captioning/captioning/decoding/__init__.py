"""From an image to words: greedy search, sampling, beam search, their fast paths, attention maps."""
