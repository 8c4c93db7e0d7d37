"""python -m fastlm.emulator run|check FILE: for people who have only a kernel."""

import sys

from .command import main

sys.exit(main())
