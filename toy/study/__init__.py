"""Five papers in miniature: what is trained, what it is asked, and the page that shows what came of it."""
