"""The parts of `weightproof.health`: numerics, what a pass is read for, thresholds, the report."""
