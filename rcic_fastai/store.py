from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'data.store')  # a module of version 0.1.0
