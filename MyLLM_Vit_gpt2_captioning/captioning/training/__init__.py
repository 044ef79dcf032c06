"""Around the training step: optimizer and schedule, state to resume from, log, trackers, report."""
