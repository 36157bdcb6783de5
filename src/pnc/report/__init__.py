"""A composite's report, one page that says what it does and costs. Start with `page`."""
