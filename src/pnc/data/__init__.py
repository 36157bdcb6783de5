"""Labelled images, from whatever holds them to folded samples. Start with `image_set`."""
