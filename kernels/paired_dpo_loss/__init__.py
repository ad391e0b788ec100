"""The loss over pairs of predictions, and the differences that it is made of."""

from .differences import PairedDifferences, paired_differences
from .op import PairedLoss, paired_dpo_loss

__all__ = ["PairedDifferences", "PairedLoss", "paired_differences", "paired_dpo_loss"]
