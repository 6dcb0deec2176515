"""The parts of a recipe: its fields, steps, sources, run and result."""
