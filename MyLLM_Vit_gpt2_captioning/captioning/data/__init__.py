"""From annotation files and photos to batches."""
