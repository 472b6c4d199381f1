"""`python -m flexgen_helm` is the command `flexgen-helm`, which `torchrun` may start in several processes."""

import sys

from flexgen_helm.cli import main

sys.exit(main())
