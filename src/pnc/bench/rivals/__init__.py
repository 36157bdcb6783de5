"""Rival methods, one file each: what else one can do with a target, a source and a few labelled images.

Each file has one `Rival`, or a few of one kind: `rival.fit(task, budget)` gives a network with logits over base and new
classes, (B, K_base + K_new), and says what was chosen. The networks of the task are never touched. A rival that cannot
use a support raises an `InputError` that says why.
"""
