"""Bugs in settings, models, rewards, the demo's models."""

NEAREST = {  # file: the tests nearest to it
    "config.py": "config presets train python_api",
    "reward.py": "reward train",
    "support/models.py": "loading sampling reward train",
    "support/text_trainer.py": "python_api loading train",
    "support/demo_models.py": "train",
}
BUGS = [  # (file, what stands there, the bug)
]
SAME = []  # (file, what stands there, what may as well stand there, why it is the same program)
