"""Training: text to windows (data), windows to a model (loop), a model to the disk (checkpoint)."""
