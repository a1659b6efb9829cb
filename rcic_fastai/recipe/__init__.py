"Settings of a training as data, with their rules."

from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'recipe.published', 'recipe.check')  # names of version 0.1.0
