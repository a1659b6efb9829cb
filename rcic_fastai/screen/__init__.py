"Tables and files of a screen: which wells and sites it has."

from rcic_fastai.renamed import moved

__getattr__ = moved(  # names of version 0.1.0
    __name__,
    'screen.channels', 'screen.core', 'screen.groups', 'screen.morphology', 'screen.cameras', 'screen.read',
    'screen.simulate', 'screen.sites', 'screen.sources', 'screen.split', 'screen.tables')
