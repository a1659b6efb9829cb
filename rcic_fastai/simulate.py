from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'screen.morphology', 'screen.cameras', 'screen.simulate')  # a module of version 0.1.0
