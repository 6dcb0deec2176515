"""LoRA adapters, live and in folders, as factored deltas."""
