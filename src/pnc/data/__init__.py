"""Labelled images, from any container to folded samples. Start with `image_set`."""
