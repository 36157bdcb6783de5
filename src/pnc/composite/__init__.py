"""What runs in production: the target with clones, fused, exported, verified. Start with `composite`."""
