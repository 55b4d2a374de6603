import sys
from pathlib import Path

import torch

# `zoo` is a module of hand-written networks that several test files share.
sys.path.insert(0, str(Path(__file__).parent))
# Small networks: a second thread costs more than it brings, above all beside other test processes.
torch.set_num_threads(1)
