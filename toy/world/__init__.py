"""A small world of drawn scenes whose facts are known: what the project trains and tests on where no real data is."""
