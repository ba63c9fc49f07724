"""Five papers in miniature: trains every system on the toy world, evaluates and compares them."""
