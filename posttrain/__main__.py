"""`python -m posttrain`: what `accelerate launch -m posttrain` starts."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="posttrain")
