"Networks for any number of channels, and which statistics a BatchNorm uses."

from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'model.core', 'model.backbone', 'model.head')  # names of version 0.1.0
