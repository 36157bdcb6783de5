"""Rival methods, one file each: what else one can do with a target, a source and a few labelled images.

Each has a function `fit(task) -> nn.Module` that gives logits over base and new classes, (B, K_base + K_new), and never
touches the networks of the task. A rival that cannot use a support raises an `InputError` that says why.
"""
