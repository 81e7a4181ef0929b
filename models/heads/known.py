"""Which of its classes a detector knows, for a teacher that learned only some of the student's."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The logit of a class that a detector does not know. Its score is exactly zero in every precision; fp16 can hold it.
UNKNOWN_LOGIT = -1e4


class KnownClasses(nn.Module):
    """The classes that a detector knows, K of the C that its scores have columns for.

    Args:
        known: for each of the C classes, whether the detector knows it.
    """

    def __init__(self, known: Sequence[bool]):
        super().__init__()
        self.numbers = [k for k, knows in enumerate(known) if knows]
        places = [self.numbers.index(k) if knows else -1 for k, knows in enumerate(known)] + [len(self.numbers)]
        # Tensors that move with the detector: a list as an index would be copied to the GPU at every step.
        self.register_buffer("columns", torch.tensor(self.numbers), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def scores(self, cls: Tensor) -> Tensor:
        """The columns (..., K) of the known classes, from scores (..., C) of all classes."""
        return cls.index_select(-1, self.columns)

    def labels(self, labels: Tensor) -> Tensor:
        """The place of each label in 0..C among the known classes: 0..K, where K is background; -1 if not known."""
        return self.places[labels]
