"""Model folders and files: what is on disk, how it is named, read and written safely."""
