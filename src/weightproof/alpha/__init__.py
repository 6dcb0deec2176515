"""Parts of `weightproof.steering`: hooks for packed weights, how far alpha may go, and the search for it."""
