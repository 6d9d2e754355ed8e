"""Bugs in the hub, and several processes."""

NEAREST = {  # file: the tests nearest to it
    "support/hub.py": "hub",
    "support/processes.py": "distributed train",
}
BUGS = [  # (file, what stands there, the bug)
]
SAME = []  # (file, what stands there, what may as well stand there, why it is the same program)
