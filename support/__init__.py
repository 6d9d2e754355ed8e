"""What keeps a run safe and comfortable: where models come from and how they are saved, demo models, evaluation, run
folder, checkpoints, several processes. The algorithm is in the files above this folder."""

import gc
import sys


def import_libraries() -> None:
    """Import torch and transformers without the garbage collector, which takes a fifth of a short run's seconds.

    A second run in the same process imports nothing and freezes nothing: frozen objects are never collected.
    """
    if "support.run.run_folder" in sys.modules:
        return
    gc.disable()
    import support.run.run_folder  # noqa: F401  (imports everything that a run needs)

    gc.freeze()
    gc.enable()
