"""Rival methods, one file each: other ways to use a target, a source and a few labelled images.

Each file has one `Rival`, or a few of one kind: `rival.fit(task, budget)` returns a network with logits over base and
new classes, (B, K_base + K_new), and what was chosen. The networks of the task are never changed. A rival that cannot
use a support raises an `InputError` with the reason.
"""
