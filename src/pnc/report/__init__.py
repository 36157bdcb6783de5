"""What is told to others: a page on what clones do and cost, and model cards. Start with `page`."""
