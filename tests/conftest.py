"""Makes the helpers beside this file importable: pytest's importlib mode leaves sys.path alone."""
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # last, for the folders here bear the names of the packages that they test
torch.set_num_threads(1)  # the models are tiny, and on a busy machine threads wait far longer than they work
