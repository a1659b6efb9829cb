"Losses for one label and for several."

from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'loss.base', 'loss.by_name', 'loss.single')  # names of version 0.1.0
