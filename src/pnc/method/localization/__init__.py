"""Which of the source's channels to keep: scored once or learned. Start with `localizer`."""
