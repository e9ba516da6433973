"""Which rows a step sees, and with what probability."""
