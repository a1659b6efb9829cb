from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'labels.metrics', 'labels.submission', 'screen.labels')  # a module of version 0.1.0
