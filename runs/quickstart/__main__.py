"""``flexgen-helm eval`` on SmolLM2-135M-Instruct, fetched first: ``python -m flexgen_helm.runs.quickstart [-m N]``."""

from __future__ import annotations

import logging
import sys

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.cli import main
from flexgen_helm.errors import FlexGenError

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        model = str(smollm2_folder())
    except FlexGenError as error:
        sys.exit(str(error))
    sys.exit(main(["eval", "--model", model, "--suite", "quickstart", *sys.argv[1:]]))
