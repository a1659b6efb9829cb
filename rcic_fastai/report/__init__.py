"A page that a person reads after a run."

from rcic_fastai.renamed import moved

__getattr__ = moved(__name__, 'report.core')  # names of version 0.1.0
