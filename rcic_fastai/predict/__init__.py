"From a learner to predictions, views, assignments and a submission."

from rcic_fastai.renamed import moved

__getattr__ = moved(  # names of version 0.1.0
    __name__,
    'predict.core', 'predict.sites', 'run.predict', 'train.inference')
