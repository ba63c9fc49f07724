"""A small world of rendered scenes whose facts are known: data for training and tests where no real data is at hand."""
