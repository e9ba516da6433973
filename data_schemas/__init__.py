"""What a click log is: the declared data set, its Arrow schema, and the rows as the model sees them."""
