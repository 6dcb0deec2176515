"""Readers of packed weights, one file for each backend (see `weightproof.readers`).

Each recognises its modules by class and attribute names and imports its backend, if it needs it at all, only when a
module of it is there. docs/quantizers.md lists what was tested.
"""
