from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'data.buffers', 'data.codec', 'data.store', 'data.pack')  # a module of version 0.1.0
