"""dreamenv: a learned simulator of Procgen that is a Gymnasium environment.

`import dreamenv; gymnasium.make("DreamProcgen-v0")` works at once with embedded weights. Importing this package only
registers the id; torch is imported when an environment is made.
"""

import os
import sys

from gymnasium.envs.registration import register

__version__ = "0.1.0"

if "torch" not in sys.modules:
    # Torch's OpenMP threads spin while they wait, 300,000 times by default: two trainings on the same cores then slow
    # each other tenfold. It is read when torch is loaded, and children inherit it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

register(id="DreamProcgen-v0", entry_point="dreamenv.env:DreamEnv", vector_entry_point="dreamenv.vector:DreamVectorEnv")
