"Kernels, data sets and downloads."

from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'kaggle.core')  # names of version 0.1.0
