"""Paired differences, intervals, confidence sequences and spikes: no torch module, no I/O."""
