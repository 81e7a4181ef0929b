"""Makes the helpers next to this file importable: pytest's importlib mode does not change sys.path."""
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # last, because folders here have the names of packages
torch.set_num_threads(1)  # the models are tiny, and on a busy machine threads mostly wait
