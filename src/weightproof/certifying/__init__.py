"""Two model folders compared and certified, and what is checked before the work begins."""
