from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'screen.simulate_atlas')  # a module of version 0.1.0
