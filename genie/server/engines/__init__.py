"""Ways to run a template faster than instruction by instruction, with the results of that."""
