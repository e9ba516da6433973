"""The batch-size laboratory: claims about mini-batches, each run and drawn by a small module of its own."""
