"The commands."

from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'cli.core')  # names of version 0.1.0
