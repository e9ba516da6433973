"""What is learned: ids to table rows, embeddings, the networks over them, and the loss."""
