"""Bugs in the loop, the run folder, resuming."""

NEAREST = {  # file: the tests nearest to it
    "train_ppo.py": "train faults",
    "support/run_folder.py": "train faults distributed",
    "support/checkpoint.py": "checkpoint faults train",
    "support/command_line.py": "train config faults distributed",
    "support/signals.py": "train distributed",
    "support/load.py": "train distributed loading",
}
BUGS = [  # (file, what stands there, the bug)
    (
        "support/checkpoint.py",
        'trainer.n_steps, trainer.kl_controller.value = state["step"], state["kl_coef"]',
        'trainer.n_steps = state["step"]',
    ),
    ("support/checkpoint.py", 'set_random_state(saved["random"])', "pass"),
    ("support/checkpoint.py", "random.setstate((version, tuple(numbers), gauss))", "pass"),
    ("support/checkpoint.py", 'torch.set_rng_state(state["torch"].cpu())', "pass"),
    ("support/checkpoint.py", "np.random.set_state((name", "str((name"),
    ("support/checkpoint.py", 'trainer.optimizer.load_state_dict(saved["optimizer"])', "pass"),
    ("support/checkpoint.py", "(trainer.average, average)", "(trainer.average, policy)"),
    ("support/checkpoint.py", 'trainer.skipped_in_a_row = state["skipped_in_a_row"]', "pass"),
    ("support/checkpoint.py", "for old in checkpoints(folder)[:-keep]:", "for old in checkpoints(folder)[:-99]:"),
    ("support/checkpoint.py", 'if sha256(path / name) != state["sha256"][name]:', "if False:"),
]
SAME = []  # (file, what stands there, what may as well stand there, why it is the same program)
