"""What keeps a run safe and comfortable: where models come from and how they are saved, demo models, evaluation, run
folder, checkpoints, several processes. The algorithm is in the files above this folder."""
