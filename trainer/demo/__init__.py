"""A page that shows a recommender in a browser: what it computes, what it looks like, and how the two are wired."""
