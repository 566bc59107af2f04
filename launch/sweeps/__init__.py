"""What launch/sweep.py is made of: the points of a sweep, where they run, and what became of them."""
