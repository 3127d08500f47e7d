"""Data sets: each a small spec that says what its images are like and loads them."""
