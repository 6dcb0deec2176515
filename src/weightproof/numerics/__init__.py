"""Algorithms on matrices behind `spectrum` and `marchenko_pastur`: Gram, Lanczos, norms, whitening."""
