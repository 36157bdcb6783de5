"""Networks by spec, with weights and preprocessing. Start with `model_specs`."""
