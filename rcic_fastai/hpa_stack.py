from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'run.stack')  # a module of version 0.1.0
