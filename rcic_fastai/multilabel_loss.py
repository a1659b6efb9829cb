from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'loss.multi', 'loss.by_name')  # a module of version 0.1.0
