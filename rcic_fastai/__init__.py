__version__ = "0.0.1"
"Classify multi-channel microscopy screens that suffer from batch effects, with fastai."
from importlib.metadata import version

__version__ = version("rcic_fastai")
