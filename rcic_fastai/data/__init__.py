"From files to batches of one domain."

from rcic_fastai.renamed import moved

__getattr__ = moved(  # names of version 0.1.0
    __name__,
    'data.block', 'data.context', 'data.domains', 'data.loader', 'data.reader', 'data.select')
