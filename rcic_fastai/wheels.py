from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'kaggle.packages')  # a module of version 0.1.0
