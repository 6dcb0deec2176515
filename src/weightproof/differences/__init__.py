"""Parts of `weightproof.deltas`: low-rank factors, where differences come from, and their file."""
