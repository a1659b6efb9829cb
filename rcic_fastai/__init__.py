"Classify multi-channel microscopy screens that suffer from batch effects, with fastai."

import warnings
from importlib.metadata import PackageNotFoundError, version

# raised while fastai is imported; nothing a user can act on
warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=FutureWarning)

try: __version__ = version("rcic_fastai")
except PackageNotFoundError: __version__ = "0+unknown"  # a source tree on the path, never installed
