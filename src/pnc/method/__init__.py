"""How a clone is made: task, scan, localize, fit, calibrate (docs/method.md). Start with `pipeline`."""
