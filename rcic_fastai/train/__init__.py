"A fastai Learner that trains stage by stage."

from rcic_fastai.renamed import moved

__getattr__ = moved(  # names of version 0.1.0
    __name__,
    'train.learner', 'train.metrics', 'train.network', 'data.statistics', 'recipe.settings', 'run.folder',
    'train.schedule', 'train.controls', 'train.loaders')
