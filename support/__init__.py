"""Everything around the algorithm: loading and saving models, demo models, evaluation, run folder, checkpoints, several
processes. The algorithm itself is in the files above this folder."""

import gc
import sys


def import_libraries() -> None:
    """Import torch and transformers with the garbage collector off; it would take a fifth of a short run's time.

    Does nothing in a second run of the same process, because frozen objects are never collected.
    """
    if "support.run.run_folder" in sys.modules:
        return
    gc.disable()
    import support.run.run_folder  # noqa: F401  (imports everything that a run needs)

    gc.freeze()
    gc.enable()
