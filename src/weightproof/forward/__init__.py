"""Forward passes: windows of input, outputs, and where two models part."""
