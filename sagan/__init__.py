import os, sys

__version__ = "0.1.0"

# Operations that a Mac's GPU lacks run on the CPU; PyTorch reads this when it is loaded
if sys.platform == 'darwin': os.environ.setdefault('PYTORCH_ENABLE_MPS_FALLBACK', '1')
