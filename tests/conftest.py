"""Shapes in most signatures are checked while testing; hypothesis runs the same examples everywhere."""

from __future__ import annotations

import signal

import hypothesis
import torch
from jaxtyping import install_import_hook

# Not region and graph: all of these call them, some thousand times in a test, and state the same shapes.
SHAPED = ("spec", "bounds", "attacks", "train", "verify")
install_import_hook([f"tightrope.{part}" for part in SHAPED], "beartype.beartype")

hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)
if not torch.cuda.is_available():  # else each call keeps a stack trace for an accelerator that may come: 4 ms
    torch.manual_seed = torch.default_generator.manual_seed
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
