"""The adapters of weightproof: everything that knows Hugging Face or W&B."""
