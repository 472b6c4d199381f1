"""Fetch the assets and print where they are: ``python -m flexgen_helm.assets``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from flexgen_helm.assets.helm_data import helm_data_folders, install_helm_data
from flexgen_helm.assets.smollm2 import smollm2_folder
from flexgen_helm.errors import FlexGenError


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m flexgen_helm.assets", description=__doc__)
    parser.add_argument(
        "--output-path", type=Path, metavar="FOLDER", help="also put the data there, for helm-run --output-path FOLDER"
    )
    output_path: Path | None = parser.parse_args().output_path
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"SmolLM2-135M-Instruct  {smollm2_folder()}")
        for folder in helm_data_folders():
            print(f"HELM data              {folder}")
        if output_path is not None:
            install_helm_data(output_path)
            print(f"HELM output path       {output_path}")
    except FlexGenError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
