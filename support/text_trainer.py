"""Provides `from support.text_trainer import TextPPOTrainer`, the import in the README."""

from support.run.text_trainer import TextPPOTrainer

__all__ = ["TextPPOTrainer"]
