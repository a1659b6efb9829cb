"Classify multi-channel microscopy screens that suffer from batch effects, with fastai."

from importlib.metadata import PackageNotFoundError, version

try: __version__ = version("rcic_fastai")
except PackageNotFoundError: __version__ = "0+unknown"  # a source tree on the path, never installed
