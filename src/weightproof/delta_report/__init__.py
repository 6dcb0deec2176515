"""The subspace report of a change: which candidate holds how much of it, as a table, a picture and a page."""
