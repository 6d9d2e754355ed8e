"""`from support.text_trainer import TextPPOTrainer`, as README promises it."""

from support.run.text_trainer import TextPPOTrainer

__all__ = ["TextPPOTrainer"]
