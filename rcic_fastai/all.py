"Everything a notebook needs: `from rcic_fastai.all import *`."
from .screen import *
from .simulate import *
from .image import *
from .store import *
from .data import *
from .augment import *
from .mix import *
from .model import *
from .loss import *
from .batchnorm import *
from .embed import *
from .train import *
from .predict import *
from .assign import *
from .pseudo import *
from .run import *
from .recipe import *
