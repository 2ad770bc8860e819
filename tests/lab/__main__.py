"""`python -m tests.lab`: the prompt of `make lab`."""

import sys

from .shell import main

sys.exit(main())
