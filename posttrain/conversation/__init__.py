"""Messages to token ids and back, in the form each model expects."""
