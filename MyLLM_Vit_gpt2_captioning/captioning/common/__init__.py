"""Used by every other room: files, progress bars, process groups, what the Hub answers."""
