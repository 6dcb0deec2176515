"""What a probe reads of tensors, matrices, circuits and changes, as frozen values."""
