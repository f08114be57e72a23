"""The tests; `python3 -m unittest` from the top finds all of them."""
