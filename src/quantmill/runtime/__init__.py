"""Running a checkpoint: the quantised linear, loading a folder, generating text, talking."""
