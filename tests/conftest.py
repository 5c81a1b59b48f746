"""What every test run needs."""

import torch

# The models are so small that handing work to other threads costs more than the work: up to ten times the wall time
# on a machine that is busy.
torch.set_num_threads(1)
