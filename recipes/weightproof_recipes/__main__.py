"""`python -m weightproof_recipes cpu_x2`: where a configuration for `accelerate launch` lies."""

import sys

from weightproof.errors import InputError
from weightproof_recipes import launch_config, launch_configs

try:
    (name,) = sys.argv[1:]
    sys.stdout.write(f"{launch_config(name)}\n")
except ValueError as error:
    asked = error if isinstance(error, InputError) else f"name one of {', '.join(launch_configs())}"
    sys.exit(f"python -m weightproof_recipes: {asked}")
