"""The loss on data: its items, windows, scores and running tally."""
