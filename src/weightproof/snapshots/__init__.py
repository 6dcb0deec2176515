"""The parts of a snapshot and where it is kept: memory, pinned memory, disk."""
