"""Bugs in judging and drawing."""

NEAREST = {  # file: the tests nearest to it
    "support/evaluation.py": "evaluation train",
    "plot_rewards.py": "plot",
}
BUGS = [  # (file, what stands there, the bug)
    (
        "support/evaluation.py",
        "weights = [(group / beta).softmax(0) for group in groups]",
        "weights = [group.softmax(0) for group in groups]",
    ),
    ("support/evaluation.py", "best.append((ways * ordered).sum())", "best.append(ordered[-1])"),
    ("support/evaluation.py", "math.log(n) - (n - 1) / n", "math.log(n)"),
]
SAME = []  # (file, what stands there, what may as well stand there, why it is the same program)
