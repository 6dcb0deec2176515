"""Verbs of the command line that need Hugging Face libraries."""
