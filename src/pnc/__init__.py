"""Partial network cloning: move classes between trained PyTorch classifiers without changing a bit of them."""
