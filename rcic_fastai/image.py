from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'data.image', 'data.store', 'screen.planes')  # a module of version 0.1.0
