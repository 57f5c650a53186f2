"""``genie results``: the Markdown page of published results, every figure of it from result files."""
