"""Which of the source's channels to keep: scored at once or learned. Start with `localizer`."""
