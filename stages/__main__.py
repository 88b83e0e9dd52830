"""`python -m stages`, which is `rlhf`; `accelerate launch -m stages ppo CONFIG` starts here."""

from stages.cli import main

if __name__ == "__main__":
    main()
