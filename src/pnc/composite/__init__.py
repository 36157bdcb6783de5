"""What runs in production: target and clones, fused, verified, removed. Start with `composite`."""
