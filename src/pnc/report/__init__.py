"""Reports for readers: an HTML page on what clones do and cost, and model cards. Start with `page`."""
