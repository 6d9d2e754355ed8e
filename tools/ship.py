"""Write down every value of each preset as published, after one has changed on purpose.

    python -m tools.ship

A run compares its settings with support/shipped.json, and says where they differ.
"""

import argparse
import dataclasses
import json

from config import PRESETS, PPOConfig
from support.settings import SHIPPED

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    values = {preset: dataclasses.asdict(PPOConfig(preset=preset)) for preset in PRESETS}
    SHIPPED.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
