"What a run is, and everything that reads or writes its folder."

from rcic_fastai.renamed import moved

__getattr__ = moved(  # names of version 0.1.0
    __name__,
    'run.train', 'run.blend', 'run.stages', 'run.submit', 'train.pseudo')
