"""The distillation methods, one file each."""
from .bckd import BCKD
from .crosskd import CrossKD
from .cwd import CWD
from .fgd import FGD
from .fitnet import FitNet
from .frs import FRS
from .gi import GI
from .ld import LD
from .logits import DKD, KD
from .mgd import MGD
from .mimic import Mimic
from .pgd import PGD
from .pkd import PKD

METHODS = {method.__name__: method for method in (
    CrossKD, Mimic, BCKD, LD, GI, KD, DKD, FGD, PKD, MGD, CWD, FitNet, PGD, FRS)}
